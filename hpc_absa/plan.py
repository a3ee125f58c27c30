"""The phases of a job without training, by the same state machine as the trainer's."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from hpc_absa.config import Job
from hpc_absa.data.registry import known_size
from hpc_absa.errors import UsageError
from hpc_absa.progress import Position, Progress, SampleStream, Step, decide
from hpc_absa.records import Eigenvalue, GradientSquares, Observation, ScheduleState
from hpc_absa.schedules import Rule, build
from hpc_absa.worldsize import ranks_for

MAX_BOUNDARIES = 100_000
"""Boundaries with a decision that can change something, after which a plan is refused: 5 s."""


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
    estimates: int
    """Decision points at which the eigenvalue is estimated."""
    adversarial: float
    """Mean fraction of the samples that is replaced by adversarial examples."""


@dataclass(frozen=True)
class Plan:
    """One possible sequence of phases."""

    steps: int
    """SGD iterations in total."""
    phases: tuple[PlannedPhase, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"steps": self.steps, "phases": [asdict(phase) for phase in self.phases]}


def training_samples(job: Job, size: int | None = None) -> int:
    """Training samples that the job uses of its data set.

    Args:
        job: the job.
        size: of the training set; by default what is known without its files.

    Raises:
        UsageError: it is not known.
    """
    stated = job.data.arguments.get("samples") if job.data.name == "script" else None
    if (size := size or stated or known_size(job.data.name)) is None:
        raise UsageError(
            f"data.name = {job.data.name!r}: its size is not known here; give --samples N"
        )
    return min(size, job.data.train_samples or size)


def stream_of(job: Job, samples: int) -> SampleStream:
    """The stream of microbatches that `job` makes of `samples` training samples."""
    return SampleStream(
        samples,
        job.train.microbatch,
        job.train.epochs,
        job.hessian.every or samples,
        job.train.drop_last,
    )


def plan(job: Job, samples: int, limit: int) -> dict[str, Plan]:
    """The plan of a job as `plan`, or as `earliest` and `latest` where measurements decide.

    `earliest` grows at every decision that can, `latest` only when patience runs out.

    Args:
        job: the job.
        samples: training samples.
        limit: the largest number of ranks.

    Raises:
        UsageError: no step can be taken, or a user-defined schedule cannot be loaded or fails.
    """
    rule = build(job, samples)
    earliest, measured = _walk(job, rule, samples, growing=True)
    plans = {"earliest" if measured else "plan": earliest}
    if measured:
        plans["latest"] = _walk(job, rule, samples, growing=False)[0]
    return {name: with_ranks(job, planned, limit) for name, planned in plans.items()}


def with_ranks(job: Job, planned: Plan, limit: int) -> Plan:
    """`planned` on at most `limit` ranks; their number never falls."""
    ranks, phases = 1, []
    for phase in planned.phases:
        ranks = max(ranks, ranks_for(job, phase.global_batch, limit))
        phases.append(replace(phase, ranks=ranks))
    return replace(planned, phases=tuple(phases))


def _walk(job: Job, rule: Rule, samples: int, *, growing: bool) -> tuple[Plan, bool]:
    """Follow the run from its first to its last step; also whether a decision needs a measurement.

    The phases are on one rank.

    Args:
        job: the job.
        rule: its schedule.
        samples: training samples.
        growing: whether measurements make the batch grow whenever they can.
    """
    stream = stream_of(job, samples)
    progress = Progress(Position(), rule.initial())
    stream.require_step(progress.schedule.global_batch)
    phases: list[PlannedPhase] = []
    begin, began_as = progress.position, progress.schedule
    measured, estimates = False, 0

    def end_phase() -> None:
        nonlocal begin, estimates
        position, state = progress.position, progress.schedule
        if position.step > begin.step:
            microbatches = position.microbatch - begin.microbatch
            epochs = stream.epoch(microbatches)
            first = begin.microbatch * epochs / microbatches
            grid = (first + epochs * (i + 0.5) / 64 for i in range(64))
            adversarial = fmean(rule.adversarial_fraction(began_as, epoch) for epoch in grid)
            steps, batch = position.step - begin.step, state.global_batch
            phases.append(
                PlannedPhase(round(epochs, 4), steps, batch, 1, state.lr, estimates, adversarial)
            )
            estimates = 0
        begin = position

    walked = 0
    while (item := progress.next(stream)) is not None:
        if not isinstance(item, Step):
            unchanged, passed = _after_unchanged(rule, stream, progress, growing)
            if unchanged is not progress:
                estimates += _estimates(rule, progress.schedule, passed)
                progress = unchanged
                continue
            if (walked := walked + 1) > MAX_BOUNDARIES:
                raise UsageError(
                    f"train.epochs = {job.train.epochs}: more than {MAX_BOUNDARIES} boundaries at "
                    f"which schedule.method = {job.schedule.method!r} can change the batch; plan "
                    "with fewer epochs, or implement Rule.unchanged"
                )
        if isinstance(item, Step):
            # Steps up to the next boundary do not differ: take them together.
            ahead = stream.boundary(progress.position.boundary).microbatch - item.start
            progress = progress.after_step(item, max(1, ahead // len(item.microbatches)))
            continue
        observation = Observation(item.epoch, item.decision_point)
        if item.decision_point:
            state = progress.schedule
            wanted = rule.wants_eigenvalue(state)
            estimates += wanted and not item.last
            measured |= wanted or rule.wants_gradients(state)
            state, eigenvalue = _measure(rule, state, growing)
            progress = replace(progress, schedule=state)
            observation = replace(observation, eigenvalue=eigenvalue)
        decision = decide(rule, progress.schedule, item, observation)
        if decision.action == "finish":
            break
        if step := progress.cut_step(item, decision):
            progress = progress.after_step(step)
        before, after = progress.schedule, decision.state
        changed = (before.global_batch, before.lr) != (after.global_batch, after.lr)
        if changed:
            end_phase()
        progress = progress.after_boundary(decision)
        if changed:
            began_as = after
    end_phase()
    if estimates and phases:  # at decision points after the last step
        phases[-1] = replace(phases[-1], estimates=phases[-1].estimates + estimates)
    return Plan(progress.position.step, tuple(phases)), measured


def _after_unchanged(
    rule: Rule, stream: SampleStream, progress: Progress, growing: bool
) -> tuple[Progress, int]:
    """After the steps and boundaries at which nothing changes, and the decision points passed.

    The same object without any.
    """
    position, state = progress.position, progress.schedule
    here = stream.boundary(position.boundary)
    points, until = rule.unchanged(state, here.epoch, growing)
    before = stream.decision_points(position.boundary)
    next_change = stream.boundary_after(before + points, until)
    if next_change <= position.boundary:
        return progress, 0
    per_step = state.global_batch // stream.microbatch
    steps = (stream.boundary(next_change).microbatch - position.microbatch) // per_step
    passed = stream.decision_points(next_change) - before
    after = replace(
        progress,
        position=Position(
            position.microbatch + steps * per_step, position.step + steps, next_change
        ),
        schedule=rule.after_unchanged(state, passed),
    )
    return after, passed


def _estimates(rule: Rule, state: ScheduleState, points: int) -> int:
    """Estimates at decision points that `unchanged` counts; of very many an extrapolation."""
    seen = range(min(points, 1000))
    wanted = sum(rule.wants_eigenvalue(rule.after_unchanged(state, i)) for i in seen)
    return wanted * points // max(1, len(seen))


def _measure(
    rule: Rule, state: ScheduleState, growing: bool
) -> tuple[ScheduleState, Eigenvalue | None]:
    """A measurement that makes the next decision grow the batch, or one that cannot.

    That is an eigenvalue at the schedule's threshold or equal to the reference, and a gradient
    that is all noise or has none.
    """
    if rule.wants_gradients(state):
        squares = GradientSquares(2, 1.0, 0.5 + 1e-12) if growing else GradientSquares(2, 1.0, 1.0)
        state = rule.learn(state, squares)
    if not rule.wants_eigenvalue(state):
        return state, None
    value = (rule.threshold(state) if growing else None) or state.reference or 1.0
    return state, Eigenvalue(value, 0.0, 0, 0, 0.0, converged=True)
