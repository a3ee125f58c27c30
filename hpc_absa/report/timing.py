"""Where the time of a run went, computed from its events: seconds, and rank-seconds.

A run is a sequence of attempts, each from one `phase_start` to the next. An attempt that ended
normally has a breakdown in its `phase_end`; one that crashed has none. The time between two
attempts is a resize, lost to a failure, or a pause (after a stop on request, or after the
supervisor itself was killed); pauses do not belong to the run.

Whatever the events contain, the categories of an attempt add up to its wall time. A second with R
ranks is R rank-seconds, whatever the ranks do in it. `docs/run-directory.md` has the rules.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hpc_absa.rundir.events import Event

CATEGORIES: Mapping[str, str] = {
    "comp": "computing",
    "comm": "communicating",
    "adversarial": "adversarial examples",
    "hessian": "Hessian",
    "diagonal": "Hessian diagonal (AdaHessian)",
    "data": "waiting for data",
    "eval": "evaluating",
    "checkpoint": "checkpointing",
    "start": "starting",
    "rehearsal": "rehearsing",
    "resize": "resizing",
    "lost": "lost to failures",
    "other": "other",
    "unmeasured": "not broken down",
}
"""Categories of seconds and their titles, in display order.

`unmeasured`: a phase that still runs, or the saved part of a crashed one; it wrote no breakdown.
"""

KINDS: Mapping[str, tuple[str, ...]] = {
    "computing": ("comp", "adversarial"),
    "communicating": ("comm",),
    "curvature": ("hessian", "diagonal"),
    "saving": ("checkpoint",),
    "evaluating": ("eval",),
    "waiting for data": ("data",),
    "starting": ("start", "rehearsal", "resize"),
    "lost": ("lost",),
    "other": ("other", "unmeasured"),
}
"""Kinds of rank-seconds, and the categories that each one sums."""


@dataclass(frozen=True)
class Attempt:
    """The events of one attempt at a phase, `phase_start` first."""

    number: int
    """0-based, over the whole run."""
    events: tuple[Event, ...]
    begin: float
    end: float
    """Of `phase_end`, else of the failure, else of the last event."""
    ending: Literal["ended", "failed", "open"]
    """`open`: neither `phase_end` nor failure (it still runs, or everything was killed)."""

    @property
    def phase(self) -> int:
        return int(self.events[0]["phase"])

    @property
    def ranks(self) -> int:
        return int(finite(self.events[0].get("ranks"), 1.0))

    @property
    def phase_end(self) -> Event:
        """The event that ended the attempt normally; empty without one."""
        ends = (e for e in self.events if e["event"] == "phase_end")
        return next(ends) if self.ending == "ended" else {}

    @property
    def failed(self) -> bool:
        """Whether it failed, or anything did before the next attempt."""
        return any(e["event"] == "failure" for e in self.events)


@dataclass(frozen=True)
class AttemptSeconds:
    """Where the seconds of one attempt went, the time before it included."""

    attempt: Attempt
    seconds: Mapping[str, float]
    """By category; they add up to `wall`."""
    wall: float
    paused: float
    """Seconds before this attempt in which nothing ran; not in `wall`."""


@dataclass(frozen=True)
class PhaseCost:
    """All attempts at one phase together."""

    phase: int
    ranks: int
    kinds: Mapping[str, float]
    """Rank-seconds by kind; they add up to `worked`."""
    queued: float
    """Seconds that a batch job waited in the queue times its ranks; not charged for."""
    idle: float
    """Rank-seconds of the slots that the run's largest phase needs and this one did not."""
    wall: float
    """Seconds without those in the queue."""

    @property
    def worked(self) -> float:
        return sum(self.kinds.values())


@dataclass(frozen=True)
class Cost:
    phases: tuple[PhaseCost, ...]
    chained: bool
    """Whether each phase had a batch job of its own size, so that no idle slots were held."""

    @property
    def kinds(self) -> list[str]:
        return [kind for kind in KINDS if any(phase.kinds[kind] > 0 for phase in self.phases)]

    @property
    def charged(self) -> float:
        """What a site would charge: worked, and idle where the slots were held."""
        return sum(p.worked + (0.0 if self.chained else p.idle) for p in self.phases)

    @property
    def largest(self) -> float:
        """The cost with the run's largest number of ranks throughout."""
        return max((p.ranks for p in self.phases), default=0) * sum(p.wall for p in self.phases)


def finite(value: Any, default: float = math.nan) -> float:
    """A number from an event; `default` for null, text and what is missing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return default
    return float(value)


def latest(events: Sequence[Event], *names: str) -> float:
    """The last finite value of these fields in any event; NaN without any."""
    values = (finite(event.get(name)) for event in reversed(events) for name in names)
    return next((value for value in values if math.isfinite(value)), math.nan)


def in_order(events: Iterable[Event]) -> list[Event]:
    """Events in the order in which things happened, by their phases and not by clocks.

    An `epoch` or a `decision` is written once a checkpoint with it is durable. If the batch grew in
    place, that can be after the start of the next phase; such events move back to their phase.
    """

    def place(event: Event) -> tuple[int, bool]:
        return event["phase"], event["event"] == "phase_end"

    ordered: list[Event] = []
    for event in events:
        index = len(ordered)
        if event["event"] in ("epoch", "decision"):
            while index and place(ordered[index - 1]) > (event["phase"], False):
                index -= 1
        ordered.insert(index, event)
    return ordered


def attempts(events: Sequence[Event]) -> tuple[Attempt, ...]:
    """Split all events of a run, superseded ones included, into attempts.

    Events before the first `phase_start` (launches that failed) belong to none.
    """
    starts = [i for i, event in enumerate(events) if event["event"] == "phase_start"]
    bounds = itertools.pairwise([*starts, len(events)])
    return tuple(_attempt(n, tuple(events[a:b])) for n, (a, b) in enumerate(bounds))


def _attempt(number: int, events: tuple[Event, ...]) -> Attempt:
    begin = finite(events[0].get("time"), 0.0)
    last = max(finite(event.get("time"), begin) for event in events)
    end = next((e for e in events if e["event"] in ("phase_end", "failure")), None)
    if end is None:
        return Attempt(number, events, begin, last, "open")
    ending: Literal["ended", "failed"] = "ended" if end["event"] == "phase_end" else "failed"
    return Attempt(number, events, begin, max(begin, finite(end.get("time"), last)), ending)


def account(events: Sequence[Event]) -> tuple[AttemptSeconds, ...]:
    """The seconds of every attempt; with the pauses they add up to the length of the log."""
    parts = attempts(events)
    starts = (finite(part.events[0].get("step"), math.inf) for part in reversed(parts))
    earliest = [*itertools.accumulate(starts, min)][::-1]  # of an attempt and all later ones
    launches = itertools.takewhile(lambda event: event["event"] != "phase_start", events)
    failures = (finite(e.get("time"), math.inf) for e in launches if e["event"] == "failure")
    first_failure = min(failures, default=math.inf)
    return tuple(
        _attempt_seconds(part, parts, first_failure, earliest[n : n + 1])
        for n, part in enumerate(parts, 1)
    )


def total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum by category, in the order of `CATEGORIES`, without zeros."""
    sums = dict.fromkeys(CATEGORIES, 0.0)
    for seconds in parts:
        for key, value in seconds.items():
            sums[key] += value
    return {key: value for key, value in sums.items() if value > 0}


def by_phase(parts: Sequence[AttemptSeconds]) -> dict[int, list[AttemptSeconds]]:
    phases: dict[int, list[AttemptSeconds]] = {}
    for part in parts:
        phases.setdefault(part.attempt.phase, []).append(part)
    return phases


def _attempt_seconds(
    part: Attempt, parts: Sequence[Attempt], first_failure: float, resumed: Sequence[float]
) -> AttemptSeconds:
    """`resumed`: the earliest step at which a later attempt started, if there is one."""
    gap, gap_seconds = _gap_before(part, parts, first_failure)
    kept_until = _kept_until(part, parts, resumed)
    length = part.end - part.begin
    work = _breakdown(part, kept_until)
    # A breakdown longer than the attempt includes starting the processes, before `phase_start`.
    early = min(max(0.0, sum(work.values()) - length), work.get("start", 0.0))
    wall = length + gap_seconds
    paused = 0.0
    overhead: dict[str, float] = {}
    if gap == "paused":
        paused = gap_seconds - min(early, gap_seconds)
        wall -= paused
    elif gap == "none":
        wall += early if part.number == 0 else 0.0
    else:
        overhead[gap] = gap_seconds + work.pop("start", 0.0) - early
        if gap == "resize" and part.ending != "ended":  # no breakdown has the start of the ranks
            event = next((e for e in part.events if e["event"] == "resize"), {})
            reported = max(0.0, finite(event.get("seconds"), overhead[gap]))
            overhead[gap] = min(reported, wall)
    worked = wall - sum(overhead.values())
    undone = min(part.end - kept_until, worked)
    if part.ending == "ended":
        # A breakdown has no times; assume that the undone part was like the rest.
        kept = 1 - undone / worked if worked > 0 else 1.0
        work = {key: value * kept for key, value in _fit(work, worked, "other").items()}
    else:
        work = _fit(work, worked - undone, "unmeasured")
    overhead["lost"] = overhead.get("lost", 0.0) + undone
    if part is parts[-1]:  # from its end to the last event
        last = max(finite(event.get("time"), part.end) for event in part.events)
        tail = max(0.0, last - part.end)
        key = "lost" if part.failed else "other"
        overhead[key] = overhead.get(key, 0.0) + tail
        wall += tail
    return AttemptSeconds(part, total((work, overhead)), wall, paused)


def _gap_before(
    part: Attempt, parts: Sequence[Attempt], first_failure: float
) -> tuple[Literal["resize", "lost", "paused", "none"], float]:
    """What the time before an attempt was, and its seconds."""
    if part.number == 0:  # launches that failed
        seconds = max(0.0, part.begin - first_failure)
        return ("lost" if seconds else "none"), seconds
    previous = parts[part.number - 1]
    seconds = max(0.0, part.begin - previous.end)
    if previous.failed:
        return "lost", seconds
    outcome = previous.phase_end.get("outcome")
    if outcome == "resize":
        return "resize", seconds
    return ("none" if outcome == "in_place" else "paused"), seconds


def _kept_until(part: Attempt, parts: Sequence[Attempt], resumed: Sequence[float]) -> float:
    """The time up to which the work of an attempt was not undone by a crash."""
    if part.ending == "failed" and not resumed:  # a restart resumes from the newest checkpoint
        saved = (e.get("step") for p in parts for e in p.events if e["event"] == "checkpoint")
        resumed = [max((finite(step, 0.0) for step in saved), default=0.0)]
    last_step = finite(part.phase_end.get("step"), -math.inf)
    if not resumed or (part.ending == "ended" and min(resumed) >= last_step):
        return part.end
    kept = (
        finite(event.get("time"), part.begin)
        for event in part.events
        if finite(event.get("step"), math.inf) <= min(resumed)
    )
    return min(part.end, max(kept, default=part.begin))


def _breakdown(part: Attempt, kept_until: float) -> dict[str, float]:
    """The seconds by category that the attempt itself wrote down."""
    if part.ending == "ended":
        seconds = part.phase_end.get("seconds")
        known: dict[str, float] = {}
        for key, value in seconds.items() if isinstance(seconds, dict) else ():
            key = key if key in CATEGORIES else "other"
            known[key] = known.get(key, 0.0) + max(0.0, finite(value, 0.0))
        return known
    decisions = [
        event
        for event in part.events
        if event["event"] == "decision" and finite(event.get("time"), kept_until) <= kept_until
    ]
    return {"hessian": sum(max(0.0, finite(e.get("seconds"), 0.0)) for e in decisions)}


def _fit(work: dict[str, float], wall: float, rest: str) -> dict[str, float]:
    """Make the categories add up: what is missing goes to `rest`, an excess is scaled away."""
    known = sum(work.values())
    if known > wall:
        return {key: value * max(0.0, wall) / known for key, value in work.items()}
    return {**work, rest: work.get(rest, 0.0) + wall - known}


def cost(events: Sequence[Event], parts: Sequence[AttemptSeconds]) -> Cost:
    """The cost of the run that wrote these events; `parts` is their `account`."""
    waits = [  # in the queue: from the event before a batch job started until it did
        (begin, max(begin, finite(event.get("time"), 0.0)))
        for previous, event in itertools.pairwise(events)
        if event["event"] == "link" and event.get("action") == "started"
        for begin in [finite(previous.get("time"), 0.0)]
    ]
    largest = max((part.attempt.ranks for part in parts), default=0)
    phases = tuple(
        _phase_cost(phase, own, parts, waits, largest) for phase, own in by_phase(parts).items()
    )
    return Cost(phases, any(event["event"] == "link" for event in events))


def _phase_cost(
    phase: int,
    own: Sequence[AttemptSeconds],
    parts: Sequence[AttemptSeconds],
    waits: Sequence[tuple[float, float]],
    largest: int,
) -> PhaseCost:
    kinds = dict.fromkeys(KINDS, 0.0)
    queued = idle = wall = 0.0
    for part in own:
        attempt, ranks = part.attempt, part.attempt.ranks
        previous_end = parts[attempt.number - 1].attempt.end if attempt.number else 0.0
        waited = sum(b - a for a, b in waits if previous_end <= a and b <= attempt.begin)
        queued += ranks * waited
        seconds = dict(part.seconds)
        in_wall = 0.0 if attempt.number == 0 or part.paused else waited
        for key in ("resize", "lost"):  # the gap before this attempt, with the wait of its job
            taken = min(seconds.get(key, 0.0), in_wall)
            seconds[key] = seconds.get(key, 0.0) - taken
            in_wall -= taken
        for kind, categories in KINDS.items():
            kinds[kind] += ranks * sum(seconds.get(key, 0.0) for key in categories)
        length = sum(seconds.values())
        idle += (largest - ranks) * length
        wall += length
    ranks = max(part.attempt.ranks for part in own)
    return PhaseCost(phase, ranks, kinds, queued, idle, wall)
