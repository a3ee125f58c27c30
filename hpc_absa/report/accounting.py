"""Where every second of a run went, from its events alone.

A run is a chain of attempts, each from one `phase_start` to the next. An attempt that ended in
order left a breakdown in its `phase_end`; what a crash interrupted left none. The gaps between
attempts are the price of a resize, the time lost to a failure, or a pause in which nobody worked
(after a stop on request, or when the supervisor itself was gone); pauses are no part of a run.

Whatever is read, the categories of each attempt add up to its wall time. The rules are in
`docs/run-directory.md`.
"""

from __future__ import annotations

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
    "data": "waiting for data",
    "eval": "evaluating",
    "checkpoint": "checkpointing",
    "start": "starting",
    "resize": "resizing",
    "lost": "lost to failures",
    "other": "other",
    "unmeasured": "not broken down",
}
"""Key of each category and its name for people, in the order they are shown.

`unmeasured` is the time of a phase that is still running, or the part of a crashed one that a
checkpoint saved: it did its work but never wrote its breakdown.
"""

Gap = Literal["resize", "lost", "paused", "none"]


@dataclass(frozen=True)
class Attempt:
    """The events of one attempt at a phase, `phase_start` first."""

    number: int
    """0-based, over the whole run."""
    phase: int
    events: tuple[Event, ...]
    begin: float
    """Unix seconds of `phase_start`."""
    end: float
    """Unix seconds of `phase_end`, else of the failure, else of the last sign of life."""
    ending: Literal["ended", "failed", "open"]
    """`open`: no end and no failure was written (still running, or everything was killed)."""

    @property
    def phase_end(self) -> Event | None:
        """The event that ended the attempt in order."""
        return next((e for e in self.events if e["event"] == "phase_end"), None)

    @property
    def failures(self) -> tuple[Event, ...]:
        """Failures during the attempt or before the next one."""
        return tuple(e for e in self.events if e["event"] == "failure")


@dataclass(frozen=True)
class AttemptSeconds:
    """Where the seconds of one attempt went, the gap before it included."""

    attempt: Attempt
    seconds: Mapping[str, float]
    """By category; they add up to `wall`."""
    wall: float
    paused: float
    """Seconds before this attempt in which nobody worked; not in `wall`."""


def finite(value: Any, default: float = math.nan) -> float:
    """A number from an event; `default` for null, text and what is missing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return default
    return float(value)


def in_order(events: Iterable[Event]) -> list[Event]:
    """Events in the order in which things happened, told by phases and not by clocks.

    An `epoch` or a `decision` is written once a checkpoint that holds it is durable. Where a batch
    grew in place, that can be after the next phase's start; such events go back to their phase.
    """
    ordered: list[Event] = []
    for event in events:
        at = len(ordered)
        if event["event"] in ("epoch", "decision"):
            phase = finite(event.get("phase"), math.inf)
            while at and _is_later(ordered[at - 1], phase):
                at -= 1
        ordered.insert(at, event)
    return ordered


def _is_later(event: Event, phase: float) -> bool:
    """Whether what a phase told of its work comes before this event."""
    here = finite(event.get("phase"), -math.inf)
    return here > phase or (here == phase and event["event"] == "phase_end")


def attempts(events: Sequence[Event]) -> tuple[Attempt, ...]:
    """Split all events of a run, superseded ones included, into attempts.

    What came before the first `phase_start` (launches that failed) belongs to no attempt.
    """
    starts = [i for i, event in enumerate(events) if event["event"] == "phase_start"]
    stops = [*starts[1:], len(events)][: len(starts)]
    return tuple(
        _attempt(n, tuple(events[a:b])) for n, (a, b) in enumerate(zip(starts, stops, strict=True))
    )


def account(events: Sequence[Event]) -> tuple[AttemptSeconds, ...]:
    """Every attempt's seconds; with the pauses they add up to the length of the log."""
    parts = attempts(events)
    if not parts:
        return ()
    preamble = events[: events.index(parts[0].events[0])]
    failed = [finite(e.get("time")) for e in preamble if e["event"] == "failure"]
    first = min(failed, default=parts[0].begin)
    return tuple(
        _attempt_seconds(part, _before(parts, part, first), _kept_until(parts, part), parts)
        for part in parts
    )


def total(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sum by category, in the order of `CATEGORIES`, those that never occurred left out."""
    sums = dict.fromkeys(CATEGORIES, 0.0)
    for seconds in parts:
        for key, value in seconds.items():
            sums[key] = sums.get(key, 0.0) + value
    return {key: value for key, value in sums.items() if value > 0}


def _attempt(number: int, events: tuple[Event, ...]) -> Attempt:
    begin = finite(events[0].get("time"), 0.0)
    ending: Literal["ended", "failed", "open"] = "open"
    end = max(finite(event.get("time"), begin) for event in events)
    for event in events:
        if event["event"] in ("phase_end", "failure"):
            ending = "ended" if event["event"] == "phase_end" else "failed"
            end = finite(event.get("time"), end)
            break
    phase = int(finite(events[0].get("phase"), 0))
    return Attempt(number, phase, events, begin, max(begin, end), ending)


def _before(parts: Sequence[Attempt], part: Attempt, first: float) -> tuple[Gap, float]:
    """What the time before an attempt was, and how long."""
    if part.number == 0:
        return "lost" if first < part.begin else "none", max(0.0, part.begin - first)
    previous = parts[part.number - 1]
    seconds = max(0.0, part.begin - previous.end)
    if previous.failures:
        return "lost", seconds
    outcome = (previous.phase_end or {}).get("outcome")
    if outcome == "resize":
        return "resize", seconds
    return ("none" if outcome == "in_place" else "paused"), seconds


def _kept_until(parts: Sequence[Attempt], part: Attempt) -> float:
    """The time up to which the work of an attempt was not undone by a crash."""
    later = parts[part.number + 1 :]
    resumed = [finite(other.events[0].get("step"), math.inf) for other in later]
    if part.ending == "failed" and not later:
        resumed.append(_newest_saved_step(parts))
    if not resumed or (part.ending == "ended" and min(resumed) >= _last_step(part)):
        return part.end
    kept = (
        finite(event.get("time"), part.begin)
        for event in part.events
        if finite(event.get("step"), math.inf) <= min(resumed)
    )
    return min(part.end, max(kept, default=part.begin))


def _last_step(part: Attempt) -> float:
    return finite((part.phase_end or {}).get("step"), -math.inf)


def _newest_saved_step(parts: Sequence[Attempt]) -> float:
    """The step that a restart would resume from, as far as the events say."""
    saved = (
        finite(event.get("step"), 0.0)
        for part in parts
        for event in part.events
        if event["event"] == "checkpoint"
    )
    return max(saved, default=0.0)


def _attempt_seconds(
    part: Attempt, before: tuple[Gap, float], kept_until: float, parts: Sequence[Attempt]
) -> AttemptSeconds:
    gap, gap_seconds = before
    length = part.end - part.begin
    work = _itemised(part, kept_until)
    # A breakdown longer than the attempt began before `phase_start`, with starting the processes.
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
        inside = work.pop("start", 0.0) - early
        overhead[gap] = gap_seconds + inside
        if gap == "resize" and part.ending != "ended":
            overhead[gap] = min(_reported_resize(part, overhead[gap]), wall)
    worked = wall - sum(overhead.values())
    undone = min(part.end - kept_until, worked)
    if part.ending == "ended":
        # A breakdown does not tell when; what was undone was like the rest.
        work = _fit(work, worked, part)
        share = 1 - undone / worked if worked > 0 else 1.0
        work = {key: value * share for key, value in work.items()}
    else:
        work = _fit(work, worked - undone, part)
    overhead["lost"] = overhead.get("lost", 0.0) + undone
    wall += _tail(part, parts, overhead)
    return AttemptSeconds(part, total((work, overhead)), wall, paused)


def _itemised(part: Attempt, kept_until: float) -> dict[str, float]:
    """What an attempt itself said about its seconds."""
    if part.phase_end is not None and part.ending == "ended":
        told = part.phase_end.get("seconds")
        items = told.items() if isinstance(told, dict) else ()
        known = {k if k in CATEGORIES else "other": 0.0 for k, _ in items}
        for key, value in items:
            known[key if key in CATEGORIES else "other"] += max(0.0, finite(value, 0.0))
        return known
    decisions = [
        event
        for event in part.events
        if event["event"] == "decision" and finite(event.get("time"), kept_until) <= kept_until
    ]
    return {"hessian": sum(max(0.0, finite(e.get("seconds"), 0.0)) for e in decisions)}


def _reported_resize(part: Attempt, derived: float) -> float:
    """The `resize` event's figure, where no breakdown tells what the start of the world took."""
    for event in part.events:
        if event["event"] == "resize":
            return max(0.0, finite(event.get("seconds"), derived))
    return derived


def _fit(work: dict[str, float], wall: float, part: Attempt) -> dict[str, float]:
    """Make the items add up: what is missing is named, an excess (clocks differ) is scaled away."""
    told = sum(work.values())
    if told > wall:
        return {key: value * max(0.0, wall) / told for key, value in work.items()}
    rest = "other" if part.ending == "ended" else "unmeasured"
    return {**work, rest: work.get(rest, 0.0) + wall - told}


def _tail(part: Attempt, parts: Sequence[Attempt], overhead: dict[str, float]) -> float:
    """Seconds after the last attempt's end, up to the last event; adds them to `overhead`."""
    if part is not parts[-1]:
        return 0.0
    last = max(finite(event.get("time"), part.end) for event in part.events)
    seconds = max(0.0, last - part.end)
    key = "lost" if part.failures else "other"
    overhead[key] = overhead.get(key, 0.0) + seconds
    return seconds
