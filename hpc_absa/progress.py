"""Steps, epochs and decision points of a run: the state machine of trainer, planner and replay.

The epochs of a run form one stream of microbatches of `b` samples. With `drop_last = false` no
sample is left out and a microbatch may contain samples of two epochs; with `true` an epoch is its
`N // b` whole microbatches. A step takes the next `M = B // b` microbatches of the stream.

A boundary (the end of an epoch, a decision point) that falls inside a step is handled before that
step begins, since the weights are the same there. If its decision changes `M`, the step is cut at
the boundary; its sum is still divided by the full `M`, so that every sample has the same weight.
Otherwise the step is taken as a whole. A step that would not be full at the end of the stream is
not taken: there are `floor(E·N / B)` steps, as in the tables of the ABSA talk.

Everything here is integers; nothing depends on time, ranks or tensors.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from hpc_absa.errors import UsageError
from hpc_absa.records import Decision, Observation, ScheduleState
from hpc_absa.schedules import Rule


@dataclass(frozen=True)
class Segment:
    """Positions `[start, stop)` of one epoch's order."""

    epoch: int
    """0-based."""
    start: int
    stop: int


@dataclass(frozen=True)
class Boundary:
    """A place in the stream where the model is evaluated or a decision is made, or both."""

    microbatch: int
    """Microbatches of the stream before it."""
    epoch: float
    """Epochs before it; an integer at the end of an epoch."""
    ends_epoch: bool
    decision_point: bool
    last: bool = False
    """Whether it is the end of the stream, where nothing is decided any more."""


@dataclass(frozen=True)
class Step:
    """One optimizer step over the microbatches `[start, stop)`."""

    start: int
    stop: int

    @property
    def microbatches(self) -> range:
        return range(self.start, self.stop)


@dataclass(frozen=True)
class Position:
    """How far a run has come."""

    microbatch: int = 0
    """Microbatches used by optimizer steps."""
    step: int = 0
    """Optimizer steps taken."""
    boundary: int = 0
    """Boundaries passed."""

    def after(self, step: Step, count: int = 1) -> Position:
        """After `step`, and `count` − 1 further steps of its size."""
        microbatch = step.start + count * (step.stop - step.start)
        return Position(microbatch, self.step + count, self.boundary)


@dataclass(frozen=True)
class SampleStream:
    """The microbatches of all epochs of a run."""

    samples: int
    """Training samples N."""
    microbatch: int
    """Samples b of one microbatch."""
    epochs: int
    every: int
    """Samples between decision points; N means once an epoch."""
    drop_last: bool = False

    @cached_property
    def microbatches(self) -> int:
        """Whole microbatches in all epochs together."""
        if self.drop_last:
            return self.epochs * self.microbatches_per_epoch
        return self.epochs * self.samples // self.microbatch

    @property
    def microbatches_per_epoch(self) -> int:
        """Whole microbatches of one epoch, with `drop_last`."""
        return self.samples // self.microbatch

    def epoch(self, microbatch: int) -> float:
        """Epochs before a microbatch; its index may be the number of all."""
        if self.drop_last:
            return microbatch / self.microbatches_per_epoch
        return microbatch * self.microbatch / self.samples

    @cached_property
    def num_boundaries(self) -> int:
        return self._boundaries_until(self.epochs * self.samples)

    def require_step(self, global_batch: int) -> None:
        """Refuse a batch of which the stream does not fill one step.

        Raises:
            UsageError: no step could be taken.
        """
        if global_batch // self.microbatch > self.microbatches:
            raise UsageError(
                f"a global batch of {global_batch} samples: expected at most the "
                f"{self.microbatches * self.microbatch} samples in train.epochs = {self.epochs} "
                f"epochs of {self.samples}, or no step can be taken; lower schedule.base_batch "
                "(bl and fb: schedule.max_batch) or raise train.epochs"
            )

    def boundary(self, index: int) -> Boundary:
        """The boundary `index`, from 0, in the order of the stream."""
        visited = self._visited(index)
        return Boundary(
            self._microbatches_until(visited),
            visited / self.samples,
            ends_epoch=visited % self.samples == 0,
            decision_point=visited % self.every == 0,
            last=visited == self.epochs * self.samples,
        )

    def decision_points(self, boundaries: int) -> int:
        """Decision points among the first `boundaries` boundaries."""
        return self._visited(boundaries - 1) // self.every if boundaries else 0

    def boundary_after(self, points: float, epoch: float) -> int:
        """Index of the first boundary at or after `epoch`, or of the decision point after `points`.

        The one that comes first; at most the last boundary.
        """
        last = self.num_boundaries - 1
        if epoch < self.epochs:
            last = self._boundaries_until(math.ceil(epoch * self.samples) - 1)
        if points < last:
            last = min(last, self._boundaries_until((int(points) + 1) * self.every) - 1)
        return last

    def passed(self, former: SampleStream, position: Position) -> int:
        """Boundaries that are behind a run which was at `position` in `former`.

        The two streams differ in `every` alone.
        """
        visited = former._visited(position.boundary - 1) if position.boundary else 0
        indices, here = range(self.num_boundaries), position.microbatch
        before = bisect_left(indices, here, key=lambda index: self.boundary(index).microbatch)
        return max(self._boundaries_until(visited), before)

    def _visited(self, index: int) -> int:
        """Nominal samples before the boundary `index`."""
        # Boundaries repeat after a period; the whole stream can be too long for a `range`.
        period = math.lcm(self.samples, self.every)
        periods, rest = divmod(index, self._boundaries_until(period))
        within = range(min(period, self.epochs * self.samples) + 1)
        return periods * period + bisect_left(within, rest + 1, key=self._boundaries_until)

    def segments(self, microbatch: int) -> tuple[Segment, ...]:
        """The samples of one microbatch: more than one segment if an epoch ends in it.

        Args:
            microbatch: index in the stream, from 0.
        """
        if self.drop_last:
            epoch, index = divmod(microbatch, self.microbatches_per_epoch)
            start = index * self.microbatch
            return (Segment(epoch, start, start + self.microbatch),)
        return tuple(self._split(microbatch * self.microbatch, (microbatch + 1) * self.microbatch))

    def _split(self, start: int, stop: int) -> Iterator[Segment]:
        while start < stop:
            epoch, first = divmod(start, self.samples)
            count = min(stop - start, self.samples - first)
            yield Segment(epoch, first, first + count)
            start += count

    def _boundaries_until(self, visited: int) -> int:
        """Boundaries after at most `visited` nominal samples: multiples of N and of `every`."""
        both = math.lcm(self.samples, self.every)
        return visited // self.samples + visited // self.every - visited // both

    def _microbatches_until(self, visited: int) -> int:
        """Microbatches that contain the first `visited` nominal samples."""
        if self.drop_last:
            count = -(-visited * self.microbatches_per_epoch // self.samples)
        else:
            count = -(-visited // self.microbatch)
        return min(count, self.microbatches)


@dataclass(frozen=True)
class Progress:
    """Everything that changes during a run and is not a tensor; saved in every checkpoint."""

    position: Position
    schedule: ScheduleState
    phase: int = 1
    """1-based; a new phase begins where the batch grows."""
    epoch: int = 0
    """Epochs finished and evaluated."""
    epoch_loss: float = 0.0
    """Sum of the training loss over the current epoch."""
    epoch_samples: float = 0
    """What `epoch_loss` is divided by: samples, or the loss's own denominators."""
    eigenvalue: float | None = None
    """The last estimate."""
    test_accuracy: float | None = None
    """The last evaluation."""

    def next(self, stream: SampleStream) -> Boundary | Step | None:
        """What comes next: a boundary, a full step, or the end of the stream (None)."""
        start = self.position.microbatch
        stop = start + self.schedule.global_batch // stream.microbatch
        if self.position.boundary < stream.num_boundaries:
            boundary = _boundary(stream, self.position.boundary)
            if boundary.microbatch < stop:
                return boundary
        return Step(start, stop) if stop <= stream.microbatches else None

    def after_step(self, step: Step, count: int = 1) -> Progress:
        """After `step`, and `count` − 1 further steps of its size."""
        return replace(self, position=self.position.after(step, count))

    def cut_step(self, boundary: Boundary, decision: Decision) -> Step | None:
        """The step up to `boundary`, if a growth there cuts the step that contains it."""
        start = self.position.microbatch
        if decision.action != "grow" or start >= boundary.microbatch:
            return None
        return Step(start, boundary.microbatch)

    def after_boundary(self, decision: Decision) -> Progress:
        """After the next boundary, with the state that its decision chose."""
        position = replace(self.position, boundary=self.position.boundary + 1)
        phase = self.phase + (decision.action == "grow")
        return replace(self, position=position, schedule=decision.state, phase=phase)


_boundary = lru_cache(16)(SampleStream.boundary)
"""The same one is asked for before each step."""


def decide(
    rule: Rule, state: ScheduleState, boundary: Boundary, observation: Observation
) -> Decision:
    """The decision of `rule` at `boundary`; at the end of the stream the run is finished."""
    if boundary.last:
        return Decision("finish", "all epochs are visited", state)
    return rule.decide(state, observation)
