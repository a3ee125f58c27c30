"""Would a converged λ over the whole Hessian sample have decided the same?

`python -m benchmarks.curvature.agreement RUN...` goes through the checkpoints of runs whose rule is
`abs` or `absa` (set `checkpoint.keep` so that all of them are kept). At each decision point it
takes λ of the saved weights to 1e-6 over all of `hessian.samples`, lets the same rule decide on
that, from the state that its own decisions led to, and compares. Once the two differ, the rest of
that run is another course and is not counted.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from hpc_absa import job as jobs
from hpc_absa.checkpoint import read
from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature import probe
from hpc_absa.plan import course_of
from hpc_absa.records import Eigenvalue, Observation
from hpc_absa.rundir import RunDir
from hpc_absa.schedules import build
from hpc_absa.training.material import (
    build_batches,
    build_model_and_loss,
    hessian_sample,
    open_data,
)
from hpc_absa.training.state import load_model


def main() -> None:
    same = total = 0
    for path in map(Path, sys.argv[1:]):
        agreed, decisions = replay(RunDir(path))
        same, total = same + agreed, total + decisions
    print(f"in all: {same} of {total} decisions as with converged estimates")


def replay(run: RunDir) -> tuple[int, int]:
    """Decisions that agree, and decisions compared."""
    job, comm, cpu = jobs.load(run.job), SerialCommunicator(), torch.device("cpu")
    dataset = open_data(job, run, comm)
    course = course_of(job, len(dataset.train))
    batches = build_batches(job, dataset, course, cpu)
    sample = hessian_sample(job, batches, course, job.hessian.samples)
    model, loss = build_model_and_loss(job, dataset, cpu)
    rule = build(job)
    state, same, total = rule.initial(), 0, 0
    made = [json.loads(line) for line in run.events.read_text().splitlines()]
    decisions = {e["step"]: e for e in made if e["event"] == "decision"}
    boundaries = {}
    for path in sorted(run.checkpoints.glob("*.h5")):
        content = read(path)
        boundaries[int(content.attributes["step"])] = content
    for step, event in sorted(decisions.items()):
        if event["action"] == "finish" or step not in boundaries:
            continue
        load_model(model, boundaries[step].groups["model"].arrays, str(step))
        value = None
        if rule.wants_eigenvalue(state):
            value = probe.estimate(
                model, loss, sample, comm, method="lanczos", samples=sample.size,
                microbatch=course.microbatch, tol=1e-6, max_iter=60,
            ).eigenvalue  # fmt: skip
        decision = rule.decide(state, Observation(event["epoch"], True, value))
        state = decision.state
        total += 1
        same += decision.action == event["action"]
        print(f"{run.path.name} epoch {event['epoch']:.2f}: {_told(value)}, {decision.action}; "
              f"the run {event['eigenvalue']}, {event['action']}, {event['reason']}")  # fmt: skip
        if decision.action != event["action"]:
            break
    return same, total


def _told(value: Eigenvalue | None) -> str:
    return "no λ" if value is None else f"λ {value.value:.4g}"


if __name__ == "__main__":
    main()
