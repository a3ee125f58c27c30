"""The phases a schedule goes through, found without training by the loop's own semantics."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from hpc_absa.config import Job
from hpc_absa.errors import UsageError
from hpc_absa.progress import Boundary, Course, Position
from hpc_absa.records import Eigenvalue, GradientSquares, Observation, ScheduleState
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
    """Outside of warm-up and cosine."""
    hours: float | None = None
    """Of computing, where the speed of a rank was given."""
    node_hours: float | None = None
    """`hours` on all nodes of the phase."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON, without what is not known."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Plan:
    """One course through a job."""

    steps: int
    """SGD iterations in total."""
    phases: tuple[PlannedPhase, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"steps": self.steps, "phases": [phase.to_dict() for phase in self.phases]}


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
        job.train.drop_last,
    )


def plan(job: Job, samples: int, limit: int) -> dict[str, Plan]:
    """The job's course under `course`, or its `earliest` and `latest` where measurements decide.

    `earliest` grows at every decision that can, `latest` only when patience runs out. `limit` is
    the largest number of ranks.

    Raises:
        UsageError: a rule of the user's own that cannot be loaded or fails.
    """
    rule = build(job)
    earliest, measured = _walk(job, rule, samples, limit, growing=True)
    if not measured:
        return {"course": earliest}
    return {"earliest": earliest, "latest": _walk(job, rule, samples, limit, growing=False)[0]}


def timed(planned: Plan, microbatch: int, rate: float, ranks_per_node: int) -> Plan:
    """`planned` with the time that its steps take to compute; nothing else is in it.

    Args:
        planned: A course.
        microbatch: Samples b of one.
        rate: Samples a second of one rank (`samples_per_second` of a run's events, on one rank).
        ranks_per_node: How many share a node.
    """
    phases = []
    for phase in planned.phases:
        rounds = -(-(phase.global_batch // microbatch) // phase.ranks)
        hours = phase.steps * rounds * microbatch / rate / 3600
        nodes = -(-phase.ranks // ranks_per_node)
        phases.append(replace(phase, hours=hours, node_hours=hours * nodes))
    return replace(planned, phases=tuple(phases))


def _measured(rule: Rule, state: ScheduleState, growing: bool) -> tuple[ScheduleState, Observation]:
    """The state and the observation in which a decision meets what makes it grow, or what cannot.

    An eigenvalue at the rule's own threshold, or as high as the reference; a gradient that is all
    noise, or none.
    """
    if rule.wants_gradients(state):
        squares = GradientSquares(2, 1.0, 0.5 + 1e-12) if growing else GradientSquares(2, 1.0, 1.0)
        state = rule.learn(state, squares)
    if not rule.wants_eigenvalue(state):
        return state, Observation(0.0, True)
    value = rule.threshold(state) if growing else None
    value = value or state.reference or 1.0
    return state, Observation(0.0, True, Eigenvalue(value, 0.0, 0, 0, 0.0, converged=True))


def _walk(job: Job, rule: Rule, samples: int, limit: int, *, growing: bool) -> tuple[Plan, bool]:
    """Follow the course; also whether anything was measured on the way."""
    measured = False
    course = course_of(job, samples)
    position, state = Position(), rule.initial()
    b = job.train.microbatch
    phases: list[PlannedPhase] = []
    begun = Position()

    def close(state: ScheduleState) -> None:
        nonlocal begun
        if position.step > begun.step:
            length = (position.microbatch - begun.microbatch) * b
            if job.train.drop_last:
                epochs = length / (course.microbatches_per_epoch * b)
            else:
                epochs = length / samples
            # A run never gives ranks back.
            before = phases[-1].ranks if phases else 1
            ranks = max(before, ranks_for(job, state.global_batch, limit))
            steps = position.step - begun.step
            phases.append(
                PlannedPhase(round(epochs, 4), steps, state.global_batch, ranks, state.lr)
            )
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
        seen = Observation(move.epoch, False)
        if move.decision_point:
            measured |= rule.wants_eigenvalue(state) or rule.wants_gradients(state)
            state, met = _measured(rule, state, growing)
            seen = replace(met, epoch=move.epoch)
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
    return Plan(position.step, tuple(phases)), measured
