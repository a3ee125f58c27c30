"""How often does the sampling error of λ grow the batch: compared as it is, and as runs bound it?

`python -m benchmarks.schedules.false_growths` draws λ with a known scatter: its true value stays at
the reference for nine decisions, and a growth by λ is false; then it falls to `--fallen` of it, and
a decision without growth is a miss.

`python -m benchmarks.schedules.false_growths RUN [--samples 128]` takes λ from a run's checkpoints
(set `checkpoint.keep` so that all are kept). At each one λ is estimated on as many disjoint samples
as the training set has, and their mean is the true value. Decisions of `abs` by λ alone are then
drawn: each estimate is one of these values. A growth is false if the true value is above the
threshold that the true reference gives; a decision is a miss if it is below, and the batch stays.

Both use the rule itself (`ABS.decide`, `ABS.wants_another`), and print one row for each number of
estimates that it may ask for, and for values that are compared alone or with their upper bound.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hpc_absa import config
from hpc_absa.checkpoint import read
from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.estimate import FALSE_GROWTH, GROUPS, Estimate, estimate_eigenvalue
from hpc_absa.curvature.repeated import mean
from hpc_absa.curvature.sampling import student_t
from hpc_absa.plan import stream_of
from hpc_absa.records import Eigenvalue, Observation, ScheduleState
from hpc_absa.rundir import RunDir
from hpc_absa.schedules import ABS, TrainSettings
from hpc_absa.training.data import HessianSample, build_loader, hessian_sample, open_data
from hpc_absa.training.setup import build_model_and_loss
from hpc_absa.training.state import load_model

ESTIMATES = (1, 2, 4, 8)
DECISIONS = 9
"""Tries at an unchanged λ: those before patience ends."""

Draw = Callable[[], Eigenvalue]
"""One estimate without a threshold; samples of one decision are disjoint."""


@dataclass
class Counts:
    trials: int = 0
    false: int = 0
    """Trials with a false growth."""
    possible: int = 0
    """Decisions with the true value below the threshold."""
    missed: int = 0
    decisions: int = 0
    estimates: int = 0

    def row(self, name: str, most: int, bounded: bool) -> str:
        false, missed = self.false / self.trials, self.missed / max(self.possible, 1)
        spread = math.sqrt(false * (1 - false) / self.trials)
        per_decision = self.estimates / self.decisions
        compared = "bound" if bounded else "value"
        return (
            f"| {name} | {most} | {compared} | {100 * false:.1f} ± {100 * spread:.1f} | "
            f"{100 * missed:.1f} | {per_decision:.2f} |"
        )


def rule(most: int, alpha: float = 2.0) -> ABS:
    """ABS by λ alone."""
    schedule = ABS(base_batch=1, max_batch=2**40, kappa=math.inf, max_estimates=most, alpha=alpha)
    return schedule.bind(TrainSettings(epochs=10**6, microbatch=1, lr=0.1))


def decide(
    by: ABS, state: ScheduleState, draw: Draw, counts: Counts, bounded: bool
) -> tuple[bool, ScheduleState]:
    """One decision; whether the batch grew, and the state after it."""
    threshold = by.threshold(state)
    estimates = [_answer(draw(), threshold, bounded)]
    while by.wants_another(state, mean(estimates).eigenvalue, len(estimates)):
        done = sum(estimate.eigenvalue.value for estimate in estimates)
        limit = None if threshold is None else (len(estimates) + 1) * threshold - done
        estimates.append(_answer(draw(), limit, bounded))
    counts.decisions += 1
    counts.estimates += len(estimates)
    decision = by.decide(state, Observation(1.0, True, mean(estimates).eigenvalue))
    return decision.action == "grow", decision.state


def _answer(drawn: Eigenvalue, threshold: float | None, bounded: bool) -> Estimate:
    """What an estimate that is asked whether λ is below the threshold returns."""
    if threshold is not None and drawn.value > threshold:
        drawn = replace(drawn, converged=False, stopped_above_threshold=True)
    elif threshold is not None and bounded and drawn.sampling_error is not None:
        margin = student_t(FALSE_GROWTH, GROUPS - 1) * drawn.sampling_error
        drawn = replace(drawn, upper_bound=drawn.value + margin)
    return Estimate(drawn, torch.zeros(1), math.nan, 0, 0)


def simulate(most: int, scatter: float, fallen: float, trials: int, bounded: bool) -> Counts:
    """Decisions on λ = exp(scatter · z), its sampling error estimated from groups of samples."""
    counts, by, random_numbers = Counts(), rule(most), random.Random(most)

    def draw_of(level: float) -> Draw:
        def draw() -> Eigenvalue:
            value = level * math.exp(scatter * random_numbers.gauss(0, 1))
            error = (
                scatter
                * value
                * statistics.stdev(random_numbers.gauss(0, 1) for _ in range(GROUPS))
            )
            return Eigenvalue(value, 0.0, 5, 128, 0.0, converged=True, sampling_error=error)

        return draw

    for _ in range(trials):
        _, start = decide(by, by.initial(), draw_of(1.0), counts, bounded)
        state, grown = start, False
        for _ in range(DECISIONS):
            grows, state = decide(by, state, draw_of(1.0), counts, bounded)
            grown |= grows
        counts.trials += 1
        counts.false += grown
        counts.possible += 1
        counts.missed += not decide(by, start, draw_of(fallen), counts, bounded)[0]
    return counts


def measure(path: Path, size: int, tol: float, max_iter: int) -> list[list[Eigenvalue]]:
    """λ at each checkpoint of a run, on disjoint samples."""
    run, comm = RunDir(path), SerialCommunicator()
    job = config.load(run.job, warn=False)
    dataset = open_data(job, run, comm)
    stream = stream_of(job, len(dataset.train))
    loader = build_loader(job, dataset, stream, torch.device("cpu"))
    model, loss = build_model_and_loss(job, dataset, torch.device("cpu"))
    order = hessian_sample(job, loader, stream, stream.samples).indices
    found = []
    for file in sorted(run.checkpoints.glob("*.h5")):
        content = read(file)
        load_model(model, content.groups["model"].arrays, str(file))
        parts = [order[k : k + size] for k in range(0, len(order) - size + 1, size)]
        found.append(
            [
                estimate_eigenvalue(
                    model, loss, HessianSample(loader, part), comm, method="lanczos", samples=size,
                    microbatch=stream.microbatch, tol=tol, max_iter=max_iter, threshold=1e12,
                ).eigenvalue
                for part in parts
            ]
        )  # fmt: skip
        values = [part.value for part in found[-1]]
        spread = statistics.stdev(math.log(value) for value in values if value > 0)
        print(f"{file.name}: λ {statistics.fmean(values):.4g}, scatter {spread:.3f}", flush=True)
    return found


def resample(
    found: Sequence[Sequence[Eigenvalue]], most: int, trials: int, bounded: bool
) -> Counts:
    """Decisions in the order of the checkpoints, each estimate one of the values measured there."""
    counts, by, numbers = Counts(), rule(most), random.Random(most)
    truth = [statistics.fmean(part.value for part in parts) for parts in found]
    for _ in range(trials):
        state, reference, false = by.initial(), math.nan, False
        for true, parts in zip(truth, found, strict=True):
            queue = iter(numbers.sample(list(parts), min(most, len(parts))))
            grew, after = decide(by, state, lambda queue=queue: next(queue), counts, bounded)
            below = true <= reference / by.alpha
            counts.possible += below
            counts.missed += below and not grew
            false |= grew and not below
            if grew or math.isnan(reference):
                reference = true
            state = replace(after, global_batch=1)
        counts.trials += 1
        counts.false += false
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tol", type=float, default=1e-2)
    parser.add_argument("--max-iter", type=int, default=20)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--fallen", type=float, default=0.4)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = None
    if arguments.run:
        found = measure(arguments.run, arguments.samples, arguments.tol, arguments.max_iter)
    print("| λ | estimates at most | compared | runs with a false growth % | missed % | ", end="")
    print("estimates per decision |")
    print("| --- | --: | --- | --: | --: | --: |")
    for most, bounded in itertools.product(ESTIMATES, (False, True)):
        if found is not None:
            counts = resample(found, most, arguments.trials, bounded)
            print(counts.row(str(arguments.run), most, bounded))
            continue
        for scatter in (0.1, 0.2, 0.3):
            counts = simulate(most, scatter, arguments.fallen, arguments.trials, bounded)
            print(counts.row(f"scatter {scatter}", most, bounded))


if __name__ == "__main__":
    main()
