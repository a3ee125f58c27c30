"""How often does a decision err? Whether λ of all data is at most t, asked on samples of them.

    python -m benchmarks.decisions [NETWORK ...] [--steps 30 300 1000] [--seeds 0 1] [--trials 100]

λ of all training data is computed to 1e-4. The question is then asked for thresholds t on samples
at the settings of every method's defaults. An answer "yes" makes a run grow; below t = λ it is
wrong. Each cell is the number of answers "yes" to as many questions as samples.

Random samples and the candidates of stratified ones are drawn with replacement: as from far more
data than there are, so that the errors of both are as large as with much data. "values compared"
leaves out the sampling error of random samples (`hessian.false_growth = 0.5`), as the talk does.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from argparse import Namespace
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.nn import functional

from benchmarks import results
from benchmarks.curvature.memo import memoized_products
from benchmarks.curvature.networks import NETWORKS, Samples, drawn, trained
from benchmarks.curvature.tolerance import reference
from benchmarks.results import Comparison, Measure
from hpc_absa.comm import SerialCommunicator
from hpc_absa.config.tables import Hessian
from hpc_absa.curvature.estimate import estimate_eigenvalue
from hpc_absa.curvature.stratified import CANDIDATES
from hpc_absa.schedules import ABS, SCHEDULES

Stage = tuple[str, int, int]
"""Network, steps and seed."""
Counts = dict[str, dict[str, float]]
"""By kind of answer and measure."""
STRATIFIED, RANDOM, VALUES = "stratified sample", "random sample", "values compared"


def main() -> None:
    parser = results.options(__doc__)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--data", type=Path, help="packed CIFAR-10, for the ResNets")
    parser.add_argument("--steps", type=int, nargs="+", default=[30, 300, 1000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.9, 1.0, 1.5, 2.0, 4.0])
    parser.add_argument("--trials", type=int, default=100, help="samples for each stage")
    parser.add_argument("--samples", type=int, help="in each, instead of the method's default")
    options = parser.parse_args()
    networks = options.networks or ["perceptron-5k", "digits-cnn", "encoder"]
    if unknown := [name for name in networks if name not in NETWORKS]:
        parser.error(f"{unknown[0]}: expected {', '.join(NETWORKS)}")
    if options.quick:
        networks, options.steps, options.seeds, options.trials = networks[:1], [300], [0], 20
    kinds = settings(options.samples)
    stages = [(n, s, r) for n in networks for s in options.steps for r in options.seeds]
    totals: dict[tuple[str, str], Counts] = {}
    begin = time.monotonic()
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), fork) as processes:
        asked = processes.map(answers, stages, [options] * len(stages))
        for done, ((name, steps, seed), of_stage) in enumerate(zip(stages, asked, strict=True), 1):
            for kind, counts in of_stage.items():
                add(totals.setdefault((kind, "all"), {}), counts)
                add(totals.setdefault((kind, name), {}), counts)
            seconds = time.monotonic() - begin
            place = f"{done} of {len(stages)}, {seconds:.0f} s: {name}, {steps} steps, seed {seed}"
            print(place, of_stage, flush=True)
    tables = []
    for kind, methods in kinds.items():
        for name in ("all", *networks):
            title = f"{', '.join(methods)}: {kind}; {'all networks' if name == 'all' else name}"
            measures = dict.fromkeys(totals[kind, name][STRATIFIED], Measure(""))
            tables.append(Comparison(title, measures, STRATIFIED))
            for row, counts in totals[kind, name].items():
                tables[-1].add(row, counts)
    results.write("decisions", tables, options)


def settings(samples: int | None) -> dict[str, list[str]]:
    """The methods that have the same settings of an estimate, by their description."""
    kinds: dict[str, list[str]] = {}
    for method, schedule in SCHEDULES.items():
        if issubclass(schedule, ABS):
            kinds.setdefault(described(hessian(method, samples)), []).append(method)
    return kinds


def hessian(method: str, samples: int | None) -> Hessian:
    defaults = dict(SCHEDULES[method].hessian_defaults)
    return Hessian(**defaults, **({"samples": samples} if samples else {}))


def described(table: Hessian) -> str:
    return f"{table.samples} samples, tolerance {table.tol:g}"


def answers(stage: Stage, options: Namespace) -> dict[str, Counts]:
    """By kind of settings, for one network at one stage of its training."""
    torch.set_num_threads(1)
    name, steps, seed = stage
    model, pool = trained(name, options.data, steps=steps, seed=seed)
    truth = reference(model, pool, 1e-4)
    counted: dict[str, Counts] = {}
    kinds = {k: hessian(m, options.samples) for k, (m, *_) in settings(options.samples).items()}
    for trial in range(options.trials):
        with memoized_products():
            for kind, table in kinds.items():
                candidates = drawn(pool, CANDIDATES * table.samples, 10_000 * seed + trial)
                counts = ask(model, candidates, table, truth, options.thresholds)
                add(counted.setdefault(kind, {}), counts)
    return counted


def ask(
    model: torch.nn.Module, candidates: Samples, table: Hessian, truth: float, shares: list[float]
) -> Counts:
    """The questions on one sample: 1 for "yes"."""
    sample = candidates.chosen(torch.arange(table.samples))
    rows = {
        STRATIFIED: {"false_growth": table.false_growth, "candidates": candidates},
        RANDOM: {"false_growth": table.false_growth},
        VALUES: {"false_growth": 0.5},
    }
    counts: Counts = {row: {"samples": 1} for row in rows}
    for share in shares:
        for row, settings in rows.items():
            value = estimate_eigenvalue(
                model, functional.cross_entropy, sample, SerialCommunicator(),
                method="lanczos", samples=sample.size, microbatch=128, tol=table.tol,
                max_iter=table.max_iter, threshold=share * truth, keep_samples=sample.size,
                **settings,
            ).eigenvalue  # fmt: skip
            yes = value.converged and value.at_most <= share * truth
            counts[row][f"t = {share:g} λ"] = int(yes)
    return counts


def add(totals: Counts, counts: Mapping[str, Mapping[str, float]]) -> None:
    for row, numbers in counts.items():
        own = totals.setdefault(row, {})
        for measure, number in numbers.items():
            own[measure] = own.get(measure, 0) + number


if __name__ == "__main__":
    main()
