"""How often does a decision err? Is λ of all data at most t, asked on random samples of them.

`python -m benchmarks.curvature.decisions NETWORK...`: λ of all training data is computed to 1e-4,
and the question is asked for thresholds t around it, at the samples and tolerance of each method's
defaults, on samples drawn with replacement. Below t = λ a growth is false. "value alone" is the
answer that leaves out the sampling error.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from benchmarks.curvature.memo import memoized_products
from benchmarks.curvature.networks import Samples, drawn, parser, stages
from benchmarks.curvature.tolerance import reference
from hpc_absa.comm import SerialCommunicator
from hpc_absa.config.tables import Hessian
from hpc_absa.curvature.estimate import Estimate, estimate_eigenvalue
from hpc_absa.schedules import SCHEDULES

THRESHOLDS = (0.9, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)


@dataclass
class Answers:
    """To one question; "below" is what makes a run grow."""

    below: int = 0
    value_alone: int = 0
    stopped_early: int = 0
    """Ended on a part of the sample."""
    stopped_early_below: int = 0
    """Of these, λ of the sample was below the threshold."""
    sample_below: int = 0
    unconverged: int = 0
    gradients: list[float] = field(default_factory=list)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    answers: dict[tuple[str, float], Answers] = defaultdict(Answers)
    for name, seed, model, pool, end in stages(options):
        pool = Samples(pool.inputs[: options.pool], pool.targets[: options.pool])
        truth = reference(model, pool, 1e-4)
        for method in options.methods:
            settings = Hessian(**SCHEDULES[method].hessian_defaults)
            if options.samples:
                settings = settings.model_copy(update={"samples": options.samples})
            ratios, errors = [], []
            for trial in range(options.trials):
                if time.perf_counter() > end and trial > 1:
                    break
                number = options.first_trial + trial + 10_000 * seed
                sample = drawn(pool, settings.samples, number)
                value, error = ask(model, sample, settings, truth, method, answers, options)
                ratios.append(value / truth)
                errors.append(error / value)
                if options.out is not None:
                    line = {"network": name, "seed": seed, "method": method, "trial": number}
                    line |= {"truth": truth, "value": value, "sampling_error": error}
                    with options.out.open("a") as file:
                        file.write(json.dumps(line) + "\n")
            ratio, error = torch.tensor(ratios), torch.tensor(errors)
            print(
                f"{name}, seed {seed}, {method}: λ {truth:.4g}; λ of a sample / λ "
                f"{ratio.mean():.2f} ± {ratio.std():.2f}; sampling error {error.mean():.2f}",
                flush=True,
            )
    print("\n| method, t / λ | below | value alone | unconverged | stopped early |", end=" ")
    print("though below, of | gradients |")
    print("| --- " * 7 + "|")
    for (method, share), a in sorted(answers.items()):
        trials, cost = len(a.gradients), sum(a.gradients) / len(a.gradients)
        print(
            f"| {method}, {share} | {a.below} of {trials} | {a.value_alone} | {a.unconverged} | "
            f"{a.stopped_early} | {a.stopped_early_below} of {a.sample_below} | {cost:.1f} |"
        )


def _options() -> argparse.Namespace:
    arguments = parser(__doc__, steps=[50, 300])
    arguments.add_argument("--methods", nargs="+", default=["absa", "absa-tuned"])
    arguments.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    arguments.add_argument("--trials", type=int, default=50, help="for each stage and method")
    arguments.add_argument("--first-trial", type=int, default=0, help="for fresh samples")
    arguments.add_argument("--samples", type=int, help="instead of the method's default")
    arguments.add_argument("--pool", type=int, default=1437, help="data that λ is defined over")
    arguments.add_argument("--out", type=Path, help="also write each sample's λ there, as JSON")
    return arguments.parse_args()


def ask(
    model: nn.Module,
    sample: Samples,
    settings: Hessian,
    truth: float,
    method: str,
    answers: dict[tuple[str, float], Answers],
    options: argparse.Namespace,
) -> tuple[float, float]:
    """λ of the sample and its sampling error; the answers are added to `answers`."""

    def estimate(tol: float, max_iter: int, threshold: float) -> Estimate:
        return estimate_eigenvalue(
            model, functional.cross_entropy, sample, SerialCommunicator(), method="lanczos",
            samples=sample.size, microbatch=128, tol=tol, max_iter=max_iter,
            threshold=threshold, false_growth=settings.false_growth, keep_samples=sample.size,
        )  # fmt: skip

    with memoized_products():
        own = estimate(1e-3, 40, 1e9 * truth).eigenvalue
        for share in options.thresholds:
            threshold = share * truth
            result = estimate(settings.tol, settings.max_iter, threshold)
            value, answer = result.eigenvalue, answers[method, share]
            early = value.samples < sample.size
            answer.below += value.converged and value.at_most <= threshold
            answer.value_alone += own.value <= threshold
            answer.stopped_early += early
            answer.sample_below += own.value <= threshold
            answer.stopped_early_below += early and own.value <= threshold
            answer.unconverged += not (value.converged or value.stopped_above_threshold)
            answer.gradients.append(result.samples_processed / sample.size)
    return own.value, own.sampling_error or 0.0


if __name__ == "__main__":
    main()
