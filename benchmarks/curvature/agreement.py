"""Would converged estimates over the whole Hessian sample have led to the same decisions?

`python -m benchmarks.curvature.agreement RUN...` goes through the checkpoints of runs with the
schedule `abs` or `absa` (set `checkpoint.keep` so that all of them are kept). At each decision
point it computes λ of the saved weights to 1e-4 over all of `hessian.samples`, lets the same
schedule decide on it, from the state that its own decisions led to, and compares. Decisions after
the first difference are not counted. A growth in the middle of a step is saved after the rest of
that step, so λ is then computed a part of a step later than in the run.

With `--questions N` every N-th of these checkpoints is also used to test the threshold: is λ above
it, for thresholds around the converged λ, with the run's own settings? The table shows how often
the answer is that of the converged λ, and the cost.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from hpc_absa import config
from hpc_absa.checkpoint import read
from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.estimate import Estimate, estimate_eigenvalue
from hpc_absa.curvature.operator import Loss
from hpc_absa.plan import stream_of
from hpc_absa.records import Eigenvalue, Observation
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import effective
from hpc_absa.schedules import build
from hpc_absa.training.data import HessianSample, build_loader, hessian_sample, open_data
from hpc_absa.training.setup import build_model_and_loss
from hpc_absa.training.state import load_model

THRESHOLDS = (0.25, 0.5, 0.8, 0.9, 0.95, 1.05, 1.1, 1.25, 2.0, 4.0)
"""Relative to the converged λ; from 1 on the run would grow."""


@dataclass
class Answers:
    """Answers for one threshold, over all checkpoints."""

    right: int = 0
    wrong: int = 0
    none: int = 0
    """Unconverged: the run does not grow, whatever λ is."""
    gradients: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Subject:
    """A run's model, loaded with one checkpoint after the other."""

    job: config.Job
    model: nn.Module
    loss: Loss
    sample: HessianSample

    def estimate(self, tol: float, max_iter: int, threshold: float | None = None) -> Estimate:
        return estimate_eigenvalue(
            self.model, self.loss, self.sample, SerialCommunicator(),
            method=self.job.hessian.method, samples=self.sample.size,
            microbatch=self.job.train.microbatch, tol=tol, max_iter=max_iter, threshold=threshold,
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curvature.agreement")
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--questions", type=int, default=0, metavar="N")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    same = total = 0
    answers: dict[float, Answers] = defaultdict(Answers)
    for path in options.runs:
        agreed, decisions = replay(RunDir(path), options.questions, answers)
        same, total = same + agreed, total + decisions
    print(f"in all: {same} of {total} decisions as with converged estimates")
    if answers:
        print("| threshold / λ | estimates | right | wrong | unconverged | gradients, mean |")
        print("| --- | --- | --- | --- | --- | --- |")
    for threshold, answer in answers.items():
        cost = sum(answer.gradients) / len(answer.gradients)
        counts = f"{len(answer.gradients)} | {answer.right} | {answer.wrong} | {answer.none}"
        print(f"| {threshold} | {counts} | {cost:.2f} |")


def replay(run: RunDir, questions: int, answers: dict[float, Answers]) -> tuple[int, int]:
    """Number of decisions that agree, and that were compared; adds to `answers`."""
    subject = _subject(run)
    rule = build(subject.job)
    state, same, total, differs = rule.initial(), 0, 0, False
    made = [e for e in effective(run.log.read()) if e["event"] == "decision"]
    saved = {int(read(p).attributes["step"]): p for p in sorted(run.checkpoints.glob("*.h5"))}
    for number, event in enumerate(made):
        if event["action"] == "finish" or event["step"] not in saved:
            continue
        content = read(saved[event["step"]])
        load_model(subject.model, content.groups["model"].arrays, str(event["step"]))
        value = None
        if rule.wants_eigenvalue(state):
            value = subject.estimate(1e-4, 60).eigenvalue
        if value is not None and questions and number % questions == 0:
            _ask(subject, value, answers)
        if differs:
            continue
        decision = rule.decide(state, Observation(event["epoch"], True, value))
        state = decision.state
        differs = decision.action != event["action"]
        total, same = total + 1, same + (not differs)
        print(f"{run.path.name} epoch {event['epoch']:.2f}: {_text(value)}, {decision.action}; "
              f"the run {event['eigenvalue']}, {event['action']}, {event['reason']}",
              flush=True)  # fmt: skip
    return same, total


def _subject(run: RunDir) -> Subject:
    job, comm, cpu = config.load(run.job), SerialCommunicator(), torch.device("cpu")
    dataset = open_data(job, run, comm)
    course = stream_of(job, len(dataset.train))
    batches = build_loader(job, dataset, course, cpu)
    sample = hessian_sample(job, batches, course, job.hessian.samples)
    return Subject(job, *build_model_and_loss(job, dataset, cpu), sample)


def _ask(subject: Subject, truth: Eigenvalue, answers: dict[float, Answers]) -> None:
    settings = subject.job.hessian
    for share in THRESHOLDS:
        threshold = share * truth.value
        result = subject.estimate(settings.tol, settings.max_iter, threshold)
        value, answer = result.eigenvalue, answers[share]
        answer.gradients.append(result.samples_processed / subject.sample.size)
        above = value.stopped_above_threshold or value.value > threshold
        if not (value.stopped_above_threshold or value.converged):
            answer.none += 1
        elif above == (share < 1):
            answer.right += 1
        else:
            answer.wrong += 1


def _text(value: Eigenvalue | None) -> str:
    return "no λ" if value is None else f"λ {value.value:.4g}"


if __name__ == "__main__":
    main()
