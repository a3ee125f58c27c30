"""The phases a schedule goes through, found without training by the loop's own semantics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from hpc_absa.course import Boundary, Course, Position
from hpc_absa.errors import UsageError
from hpc_absa.job import Job
from hpc_absa.records import Eigenvalue, Observation, ScheduleState
from hpc_absa.schedules import Rule, build
from hpc_absa.worldsize import ranks_for

KNOWN_SIZES = {
    "digits": 1437,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "svhn": 73_257,
    "tinyimagenet": 100_000,
    "imagenet": 1_281_167,
}
"""Training samples of the built-in data sets, so that a plan needs no data at hand."""


@dataclass(frozen=True)
class PlannedPhase:
    """A stretch at one global batch and one learning rate."""

    epochs: float
    """Length in epochs."""
    steps: int
    global_batch: int
    ranks: int
    lr: float
    """At the phase's end, so after a warm-up."""


@dataclass(frozen=True)
class Plan:
    """One course through a job."""

    steps: int
    """SGD iterations in total."""
    phases: tuple[PlannedPhase, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"steps": self.steps, "phases": [asdict(phase) for phase in self.phases]}


def training_samples(job: Job) -> int:
    """Training samples of the job's data set, where they are known without its files.

    Raises:
        UsageError: the data set is the user's own.
    """
    try:
        return KNOWN_SIZES[job.data.name]
    except KeyError:
        raise UsageError(
            f"data.name = {job.data.name!r}: its size is not known here; give --samples N"
        ) from None


def course_of(job: Job, samples: int) -> Course:
    """The stream of microbatches that `job` makes of `samples` training samples."""
    return Course(
        samples,
        job.train.microbatch,
        job.train.epochs,
        job.hessian.every or samples,
        job.train.remainder,
    )


def plan(job: Job, samples: int, limit: int) -> dict[str, Plan]:
    """The job's course under `course`, or its `earliest` and `latest` where curvature decides.

    `earliest` grows at every decision after the first, `latest` only when patience runs out.
    `limit` is the largest number of ranks.
    """
    rule = build(job)
    if not rule.wants_eigenvalue(rule.initial()):
        return {"course": _walk(job, rule, samples, limit, lambda state: None)}
    alpha = getattr(job.schedule, "alpha", 1.0)
    falling = _walk(job, rule, samples, limit, lambda state: _scripted(state, alpha))
    level = _walk(job, rule, samples, limit, lambda state: _scripted(state, 1.0))
    return {"earliest": falling, "latest": level}


def _scripted(state: ScheduleState, fall: float) -> Eigenvalue:
    """An eigenvalue that has fallen by a factor since the reference was taken."""
    value = 1.0 if state.reference is None else state.reference / fall
    return Eigenvalue(value, 0.0, 0, 0, 0.0, converged=True)


def _walk(
    job: Job,
    rule: Rule,
    samples: int,
    limit: int,
    eigenvalue: Callable[[ScheduleState], Eigenvalue | None],
) -> Plan:
    """Follow the course; `eigenvalue` gives the estimate that a decision in some state meets."""
    course = course_of(job, samples)
    position, state = Position(), rule.initial()
    b = job.train.microbatch
    phases: list[PlannedPhase] = []
    begun = Position()

    def close(state: ScheduleState) -> None:
        nonlocal begun
        if position.step > begun.step:
            length = (position.microbatch - begun.microbatch) * b
            if job.train.remainder == "drop":
                epochs = length / (course.microbatches_per_epoch * b)
            else:
                epochs = length / samples
            epoch = position.microbatch * b / samples
            # A run never gives ranks back.
            before = phases[-1].ranks if phases else 1
            ranks = max(before, ranks_for(job, state.global_batch, limit))
            lr = rule.lr(state, epoch)
            steps = position.step - begun.step
            phases.append(PlannedPhase(round(epochs, 4), steps, state.global_batch, ranks, lr))
        begun = position

    while (move := course.next(position, state.global_batch // b)) is not None:
        if not isinstance(move, Boundary):
            # Steps up to the next boundary differ in nothing, so they are taken at once.
            ahead = course.boundaries[position.boundary].microbatch - position.microbatch
            count = max(1, ahead // (move.stop - move.start))
            position = replace(
                position,
                microbatch=position.microbatch + count * (move.stop - move.start),
                step=position.step + count,
            )
            continue
        met = eigenvalue(state) if move.decision_point else None
        seen = Observation(move.epoch, move.decision_point, met)
        decision = rule.decide(state, seen)
        position = replace(position, boundary=position.boundary + 1)
        if position.boundary == len(course.boundaries):
            break  # the run is over: nothing is decided any more
        if decision.action == "grow" and position.microbatch < move.microbatch:
            position = replace(position, microbatch=move.microbatch, step=position.step + 1)
        if (decision.state.global_batch, decision.state.lr) != (state.global_batch, state.lr):
            close(state)
        state = decision.state
    close(state)
    return Plan(position.step, tuple(phases))
