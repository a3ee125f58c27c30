"""The decisions of a run derived again from its events, by the run's own rule or by a changed one.

The events hold everything a rule saw (`docs/run-directory.md`), and rules are pure, so the run's
own parameters must lead to the same decisions. Other parameters are answered as far as the
recorded λ reach: what they do not say is named, and after the first decision that differs the run
would have been another one, with other λ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hpc_absa import config
from hpc_absa.config import Job
from hpc_absa.errors import UsageError
from hpc_absa.records import Decision, Eigenvalue, Observation, ScheduleState
from hpc_absa.report import text
from hpc_absa.report.accounting import finite
from hpc_absa.report.history import require_run
from hpc_absa.rundir.events import Event, effective
from hpc_absa.schedules import Rule, build

CHANGEABLE = ("schedule", "train.lr", "train.lr_decay", "train.milestones")
"""What a rule is made of; anything else would have changed the λ themselves."""


@dataclass(frozen=True)
class Replayed:
    """A decision as the rule derives it, beside the one that was recorded."""

    epoch: float
    step: int | None
    """None where the run recorded no decision here."""
    eigenvalue: float | None
    reference: float | None
    """What λ was compared with."""
    action: str
    next_batch: int
    next_lr: float
    reason: str
    recorded: Mapping[str, Any] | None
    """`reference`, `action`, `next_batch`, `next_lr` of the event."""
    same: bool
    unknown: str | None
    """What the recorded λ does not say about this decision."""


@dataclass(frozen=True)
class Course:
    """All decisions under one set of parameters."""

    changes: tuple[str, ...]
    """`key=value`; none for the run's own parameters."""
    decisions: tuple[Replayed, ...]

    @property
    def differing(self) -> tuple[Replayed, ...]:
        """Those that are not the recorded ones."""
        return tuple(decision for decision in self.decisions if not decision.same)

    @property
    def growths(self) -> tuple[Replayed, ...]:
        """Those that grow the batch."""
        return tuple(decision for decision in self.decisions if decision.action == "grow")

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "changes": list(self.changes),
            "agrees": not self.differing,
            "first_difference": self.differing[0].epoch if self.differing else None,
            "growths": [decision.epoch for decision in self.growths],
            "decisions": [asdict(decision) for decision in self.decisions],
        }


def replay(path: Path, changes: Sequence[str] = ()) -> Course:
    """Derive the decisions of the run in `path` again, with `key=value` changes to its job.

    Raises:
        UsageError: no run directory, no readable job, or a change of what no rule looks at.
    """
    run = require_run(path)
    for change in changes:
        key = change.partition("=")[0].strip()
        if not any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE):
            raise UsageError(
                f"--set {change}: a replay can change schedule.*, {', '.join(CHANGEABLE[1:])}; "
                "anything else would have changed the eigenvalues themselves"
            )
    own, job = config.load(run.job, warn=False), config.load(run.job, tuple(changes), warn=False)
    events = effective(run.log.read())
    return Course(tuple(changes), tuple(_derive(own, job, events)))


def _derive(own: Job, job: Job, events: Sequence[Event]) -> Iterator[Replayed]:
    """Follow the boundaries of the recorded course with the rule of `job`."""
    rule = build(job)
    state = rule.initial()
    decided = {finite(e.get("epoch")): e for e in events if e["event"] == "decision"}
    ends = {finite(e.get("epoch")) for e in events if e["event"] == "epoch"}
    whole = max((finite(e.get("hessian_samples"), 0.0) for e in decided.values()), default=0.0)
    for epoch in sorted(decided.keys() | ends):
        event = decided.get(epoch)
        seen, unknown = None, None
        if event is not None:
            state = rule.recall(state, event)
            seen, unknown = _evidence(own, event, rule, state, whole)
        if event is not None and epoch >= own.train.epochs:
            decision = Decision("finish", "all epochs are visited", state)
        else:
            decision = rule.decide(state, Observation(epoch, event is not None, seen))
        if event is not None or decision.action == "grow":
            yield _compared(epoch, event, state, decision, unknown)
        state = decision.state


def _evidence(
    own: Job, event: Event, rule: Rule, state: ScheduleState, whole: float
) -> tuple[Eigenvalue | None, str | None]:
    """The λ that a rule in `state` may go by, and what is not known of it.

    An estimate that ended early said that λ lies above its own threshold, and that is all it said.
    """
    if finite(event.get("epoch")) >= own.train.epochs:
        return None, None
    if rule.wants_gradients(state) and "noise_scale" not in event:
        return None, "the run measured no gradient noise here"
    if not rule.wants_eigenvalue(state):
        return None, None
    matvecs = int(finite(event.get("matvecs"), 0.0))
    if not matvecs:
        return None, "the run estimated no λ here"
    found = Eigenvalue(
        value=finite(event.get("eigenvalue")),
        residual=finite(event.get("residual")),
        matvecs=matvecs,
        samples=int(finite(event.get("hessian_samples"), 0.0)),
        seconds=finite(event.get("seconds"), 0.0),
        converged=bool(event.get("converged")),
        stopped_above_threshold=bool(event.get("stopped_above_threshold")),
    )
    if not found.stopped_above_threshold:
        return found, None
    threshold, above = rule.threshold(state), _above(own, event, found, whole)
    if threshold is not None and threshold <= above:
        return found, None
    asked = "its value" if threshold is None else f"whether it is above {threshold:.4g}"
    plain = Eigenvalue(**{**asdict(found), "stopped_above_threshold": False})
    return plain, f"λ is above {above:.4g}; {asked} was not asked"


def _above(own: Job, event: Event, found: Eigenvalue, whole: float) -> float:
    """The largest threshold that an estimate which ended early is known to lie above.

    Its value where that is a Rayleigh quotient of the whole sample. One of the coarse sample is
    only evidence for the threshold it was compared with.
    """
    if found.samples >= whole:
        return found.value
    return finite(event.get("reference")) / float(getattr(own.schedule, "alpha", 1.0))


def _compared(
    epoch: float, event: Event | None, before: ScheduleState, made: Decision, unknown: str | None
) -> Replayed:
    derived = {
        "reference": before.reference,
        "action": made.action,
        "next_batch": made.state.global_batch,
        "next_lr": made.state.lr,
    }
    recorded = {name: event.get(name) for name in derived} if event else None
    value = finite(event.get("eigenvalue")) if event else math.nan
    return Replayed(
        epoch=epoch,
        step=int(event["step"]) if event and event.get("step") is not None else None,
        eigenvalue=value if math.isfinite(value) else None,
        reference=before.reference,
        action=made.action,
        next_batch=made.state.global_batch,
        next_lr=made.state.lr,
        reason=made.reason,
        recorded=recorded,
        same=recorded is not None and all(_equal(derived[n], recorded[n]) for n in derived),
        unknown=unknown,
    )


def _equal(derived: Any, recorded: Any) -> bool:
    """Numbers up to what another machine's arithmetic may differ by."""
    if isinstance(derived, float) and isinstance(recorded, int | float):
        return math.isclose(derived, recorded, rel_tol=1e-12)
    return bool(derived == recorded)


def render(course: Course, console: Console) -> None:
    """Print a course for people."""
    title = ", ".join(course.changes) or "the run's own parameters"
    table = Table(title=title, title_justify="left")
    for name in ("epoch", "λ", "compared with", "batch", "recorded"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for decision in course.decisions:
        recorded = decision.recorded or {}
        table.add_row(
            text.epoch(decision.epoch),
            text.number(decision.eigenvalue),
            text.number(decision.reference),
            f"{decision.action} {decision.next_batch}",
            f"{recorded.get('action', text.MISSING)} {recorded.get('next_batch', '')}".strip(),
            "; ".join(filter(None, [decision.reason, decision.unknown])),
            style="" if decision.same else "yellow",
        )
    console.print(table)
    console.print(summary(course), soft_wrap=True)


def summary(course: Course) -> str:
    """How the course compares with what was recorded, in a sentence or two."""
    count, first = (
        text.plural(len(course.decisions), "decision"),
        next(iter(course.differing), None),
    )
    if first is None:
        return f"{count}, every one as recorded."
    told = f"{count}, {len(course.differing)} otherwise than recorded, first at epoch "
    told += f"{text.epoch(first.epoch)}: {_difference(first)}."
    if course.changes:
        told += " From there on the run would have been another one, with other λ."
    return told


def _difference(decision: Replayed) -> str:
    recorded = decision.recorded
    if recorded is None:
        return f"{decision.action} to batch {decision.next_batch}, no decision recorded"
    derived = asdict(decision)
    return ", ".join(
        f"{name} {_told(derived[name])}, recorded {_told(value)}"
        for name, value in recorded.items()
        if not _equal(derived[name], value)
    )


def _told(value: Any) -> str:
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
