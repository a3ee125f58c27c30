"""What a run cost: rank-seconds by kind, against those of the largest world throughout.

A second in which a world of R ranks exists costs R rank-seconds, whatever the ranks do in it. Two
kinds are no work of ranks: `queued`, seconds in which a batch job waits times the ranks it waits
for, which nobody is charged for; and `idle`, places that the largest world of the run needs and a
smaller one left empty, which only a run that holds them throughout (every launcher but `slurm`) is
charged for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hpc_absa.report.accounting import AttemptSeconds, account, finite, in_order
from hpc_absa.rundir.events import Event

KINDS: Mapping[str, tuple[str, ...]] = {
    "computing": ("comp", "adversarial"),
    "communicating": ("comm",),
    "curvature": ("hessian",),
    "saving": ("checkpoint",),
    "evaluating": ("eval",),
    "waiting for data": ("data",),
    "starting": ("start", "resize"),
    "lost": ("lost",),
    "other": ("other", "unmeasured"),
}
"""Kinds of work, and the categories of `accounting.CATEGORIES` that each gathers."""


@dataclass(frozen=True)
class PhaseCost:
    """One phase, all attempts at it together."""

    phase: int
    ranks: int
    kinds: Mapping[str, float]
    """Rank-seconds by kind of work; their sum is `worked`."""
    queued: float
    idle: float
    wall: float
    """Seconds, those in a queue left out."""

    @property
    def worked(self) -> float:
        """Rank-seconds of ranks that were there."""
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Cost:
    """A whole run."""

    phases: tuple[PhaseCost, ...]
    chained: bool
    """Whether each phase had a batch job of its own size, so that no idle places were held."""

    @property
    def charged(self) -> float:
        """Rank-seconds that a site would charge: worked, and idle where places were held."""
        return sum(p.worked + (0.0 if self.chained else p.idle) for p in self.phases)

    @property
    def largest(self) -> float:
        """Rank-seconds of the run's largest world, had it been there for as long as the run was."""
        return max((p.ranks for p in self.phases), default=0) * sum(p.wall for p in self.phases)


def cost(written: Sequence[Event]) -> Cost:
    """The cost of the run that wrote these events."""
    ordered = in_order(written)
    parts = account(ordered)
    waits = tuple(_waits(ordered))
    largest = max((_ranks(part) for part in parts), default=0)
    numbers = dict.fromkeys(part.attempt.phase for part in parts)
    phases = tuple(
        _phase(number, [p for p in parts if p.attempt.phase == number], parts, waits, largest)
        for number in numbers
    )
    return Cost(phases, any(event["event"] == "link" for event in ordered))


def _phase(
    number: int,
    mine: Sequence[AttemptSeconds],
    parts: Sequence[AttemptSeconds],
    waits: Sequence[tuple[float, float]],
    largest: int,
) -> PhaseCost:
    kinds = dict.fromkeys(KINDS, 0.0)
    queued = idle = wall = 0.0
    for part in mine:
        ranks = _ranks(part)
        waited, waited_in_wall = _waited(part, parts, waits)
        seconds = dict(part.seconds)
        for key in ("resize", "lost"):  # the gap before this attempt, in which its job was queued
            taken = min(seconds.get(key, 0.0), waited_in_wall)
            seconds[key] = seconds.get(key, 0.0) - taken
            waited_in_wall -= taken
        for kind, categories in KINDS.items():
            kinds[kind] += ranks * sum(seconds.get(key, 0.0) for key in categories)
        length = sum(seconds.values())
        queued += ranks * waited
        idle += (largest - ranks) * length
        wall += length
    return PhaseCost(number, max(map(_ranks, mine)), kinds, queued, idle, wall)


def _waited(
    part: AttemptSeconds, parts: Sequence[AttemptSeconds], waits: Iterable[tuple[float, float]]
) -> tuple[float, float]:
    """Seconds that jobs waited before this attempt began: all, and those within its wall time."""
    begin = part.attempt.begin
    before = parts[part.attempt.number - 1].attempt.end if part.attempt.number else 0.0
    mine = [(a, b) for a, b in waits if before <= a and b <= begin]
    waited = sum(b - a for a, b in mine)
    return waited, 0.0 if part.attempt.number == 0 or part.paused else waited


def _waits(ordered: Sequence[Event]) -> Iterable[tuple[float, float]]:
    """From the last word before a batch job started until it did: time in the queue."""
    for previous, event in itertools.pairwise(ordered):
        if event["event"] == "link" and event.get("action") == "started":
            begin, end = finite(previous.get("time"), 0.0), finite(event.get("time"), 0.0)
            yield begin, max(begin, end)


def _ranks(part: AttemptSeconds) -> int:
    return int(finite(part.attempt.events[0].get("ranks"), 1.0))
