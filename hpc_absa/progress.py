"""Where steps, epochs and decision points fall in the stream of microbatches.

The one semantics that the planner and the training loop share. All of it is integers; nothing here
knows a clock, a rank or a tensor.

The epochs of a run form one stream of microbatches of `b` samples. With `drop_last = false`
nothing is dropped and a microbatch may straddle an epoch's end; with `true` an epoch is its
`N // b` whole microbatches. A step takes the next `M = B // b` microbatches of the stream wherever
epochs end.
A boundary that falls inside a step is met before that step begins: the weights are the same there.
Where the boundary's decision changes `M`, the step is cut at the boundary (its shorter sum still
divided by the full `M`, so that every sample weighs the same); otherwise it goes on over it.
At the stream's end a step that cannot be filled is not taken: `floor(E·N / B)` steps, as in the
tables of the ABSA talk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Segment:
    """Positions `[start, stop)` of one epoch's order."""

    epoch: int
    """0-based."""
    start: int
    stop: int


@dataclass(frozen=True)
class Boundary:
    """A place of the stream where something is looked at."""

    microbatch: int
    """Microbatches of the stream before it."""
    epoch: float
    """Epochs before it; whole at an epoch's end."""
    ends_epoch: bool
    decision_point: bool


@dataclass(frozen=True)
class Step:
    """One optimizer step over the microbatches `[start, stop)`."""

    start: int
    stop: int


@dataclass(frozen=True)
class Position:
    """How far a run has come; saved in every checkpoint."""

    microbatch: int = 0
    """Microbatches that optimizer steps have consumed."""
    step: int = 0
    """Optimizer steps taken."""
    boundary: int = 0
    """Boundaries met."""


@dataclass(frozen=True)
class Course:
    """The stream of one run."""

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
        """Whole microbatches of one epoch (`drop_last`)."""
        return self.samples // self.microbatch

    @cached_property
    def boundaries(self) -> tuple[Boundary, ...]:
        """Epoch ends and decision points, in order; the last one is the end of the stream."""
        ends = {(epoch * self.samples): (True, False) for epoch in range(1, self.epochs + 1)}
        for visited in range(self.every, self.epochs * self.samples + 1, self.every):
            ends[visited] = (visited in ends, True)
        return tuple(
            Boundary(self._at(visited), visited / self.samples, ends_epoch, decision_point)
            for visited, (ends_epoch, decision_point) in sorted(ends.items())
        )

    def next(self, position: Position, microbatches_per_step: int) -> Boundary | Step | None:
        """What comes at `position`: a boundary to look at, a step to take, or the end (None)."""
        stop = position.microbatch + microbatches_per_step
        if position.boundary < len(self.boundaries):
            boundary = self.boundaries[position.boundary]
            if boundary.microbatch < stop:
                return boundary
        return Step(position.microbatch, stop) if stop <= self.microbatches else None

    def segments(self, microbatch: int) -> tuple[Segment, ...]:
        """The samples of one microbatch: one segment, or more where it straddles epoch ends."""
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

    def _at(self, visited: int) -> int:
        """The first microbatch boundary at or after `visited` nominal samples."""
        if self.drop_last:
            at = -(-visited * self.microbatches_per_epoch // self.samples)
        else:
            at = -(-visited // self.microbatch)
        return min(at, self.microbatches)
