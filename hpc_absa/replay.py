"""Derive the decisions of a run again from its events, with its own or with other parameters.

The events contain everything that a schedule observes (`docs/run-directory.md`), and schedules are
pure functions, so the run's own parameters must lead to the recorded decisions. Other parameters
can be evaluated as far as the recorded eigenvalues allow; what they do not determine is reported.
After the first decision that differs, a real run would have had other eigenvalues.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hpc_absa import config
from hpc_absa.config import Job
from hpc_absa.data.registry import known_size
from hpc_absa.errors import UsageError
from hpc_absa.progress import Boundary, Position, Progress, decide
from hpc_absa.records import Decision, Eigenvalue, Observation, ScheduleState
from hpc_absa.report import format as text
from hpc_absa.report.history import require_run
from hpc_absa.report.timing import finite
from hpc_absa.rundir.events import Event, effective
from hpc_absa.schedules import Rule, build

CHANGEABLE = ("schedule", "train.lr", "train.lr_decay", "train.milestones")
"""What a schedule depends on; any other key would have changed the eigenvalues."""


@dataclass(frozen=True)
class Replayed:
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
    cause: str | None
    """What made the batch grow."""
    recorded: Mapping[str, Any] | None
    """`reference`, `action`, `next_batch`, `next_lr` of the event."""
    same: bool
    unknown: str | None
    """What the recorded eigenvalue does not determine about this decision."""


@dataclass(frozen=True)
class Replay:
    changes: tuple[str, ...]
    """`key=value`; none for the run's own parameters."""
    decisions: tuple[Replayed, ...]

    @property
    def differing(self) -> tuple[Replayed, ...]:
        return tuple(decision for decision in self.decisions if not decision.same)

    @property
    def growths(self) -> tuple[Replayed, ...]:
        return tuple(decision for decision in self.decisions if decision.action == "grow")

    def to_dict(self) -> dict[str, Any]:
        return {
            "changes": list(self.changes),
            "agrees": not self.differing,
            "first_difference": self.differing[0].epoch if self.differing else None,
            "growths": [decision.epoch for decision in self.growths],
            "decisions": [asdict(decision) for decision in self.decisions],
        }


def replay(path: Path, changes: Sequence[str] = ()) -> Replay:
    """Derive the decisions of the run in `path` again, with `key=value` changes to its job.

    Raises:
        UsageError: no run directory, no readable job, or a change that a replay cannot evaluate.
    """
    run = require_run(path)
    for change in changes:
        key = change.partition("=")[0].strip()
        if not any(key == name or key.startswith(f"{name}.") for name in CHANGEABLE):
            raise UsageError(
                f"--set {change}: a replay can change schedule.*, {', '.join(CHANGEABLE[1:])}; "
                "any other key would have changed the eigenvalues"
            )
    own, job = config.load(run.job, warn=False), config.load(run.job, tuple(changes), warn=False)
    events = effective(run.log.read())
    return Replay(tuple(changes), tuple(_derive(own, job, events)))


def _derive(own: Job, job: Job, events: Sequence[Event]) -> Iterator[Replayed]:
    """Decide again at every boundary that the run recorded, by the schedule of `job`."""
    rule = build(job, _training_samples(own, events))
    progress = Progress(Position(), rule.initial())
    events = [e for e in events if math.isfinite(finite(e.get("epoch")))]
    decisions = {finite(e["epoch"]): e for e in events if e["event"] == "decision"}
    ends = {finite(e["epoch"]) for e in events if e["event"] == "epoch"}
    largest = max((finite(e.get("hessian_samples"), 0.0) for e in decisions.values()), default=0.0)
    whole = min(largest, own.hessian.samples)
    for epoch in sorted(decisions.keys() | ends):
        event, eigenvalue, unknown = decisions.get(epoch), None, None
        state = progress.schedule
        if event is not None:
            state = rule.recall(state, event)
            eigenvalue, unknown = _evidence(own, event, rule, state, whole)
        last = event is not None and epoch >= own.train.epochs
        boundary = Boundary(0, epoch, epoch in ends, event is not None, last)
        observation = Observation(epoch, boundary.decision_point, eigenvalue)
        decision = decide(rule, state, boundary, observation)
        if event is not None or decision.action == "grow":
            yield _compared(epoch, event, state, decision, unknown)
        progress = progress.after_boundary(decision)


def _training_samples(own: Job, events: Sequence[Event]) -> int | None:
    """As the run recorded it; logs of earlier versions have no such field."""
    recorded = (finite(event.get("training_samples"), 0.0) for event in events)
    return next((int(n) for n in recorded if n > 0), None) or known_size(own.data.name)


def _evidence(
    own: Job, event: Event, rule: Rule, state: ScheduleState, whole: float
) -> tuple[Eigenvalue | None, str | None]:
    """The recorded eigenvalue as the schedule may use it in `state`, and what is not known of it.

    An estimate that stopped early only shows that λ is above the threshold of the run.
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
    eigenvalue = Eigenvalue(
        value=finite(event.get("eigenvalue")),
        residual=finite(event.get("residual")),
        matvecs=matvecs,
        samples=int(finite(event.get("hessian_samples"), 0.0)),
        seconds=finite(event.get("seconds"), 0.0),
        converged=bool(event.get("converged")),
        stopped_above_threshold=bool(event.get("stopped_above_threshold")),
        error=event.get("error"),
        sampling_error=event.get("sampling_error"),
        upper_bound=event.get("upper_bound"),
    )
    if not eigenvalue.stopped_above_threshold:
        return eigenvalue, None
    threshold, above = rule.threshold(state), _lower_bound(own, event, eigenvalue, whole)
    if threshold is not None and threshold <= above:
        return eigenvalue, None
    what = "its value" if threshold is None else f"whether it is above {threshold:.4g}"
    plain = replace(eigenvalue, stopped_above_threshold=False)
    return plain, f"λ is above {above:.4g}; {what} was not estimated"


def _lower_bound(own: Job, event: Event, eigenvalue: Eigenvalue, whole: float) -> float:
    """The largest threshold that λ is known to exceed, from an estimate that stopped early.

    That is the estimate's value if it is a Rayleigh quotient over the whole sample. A value over
    the coarse sample only shows that λ exceeds the threshold it was compared with.
    """
    if eigenvalue.samples >= whole:
        return eigenvalue.value
    return finite(event.get("reference")) / float(getattr(own.schedule, "alpha", 1.0))


def _compared(
    epoch: float, event: Event | None, before: ScheduleState, made: Decision, unknown: str | None
) -> Replayed:
    derived: dict[str, Any] = {
        "reference": before.reference,
        "action": made.action,
        "next_batch": made.state.global_batch,
        "next_lr": made.state.lr,
    }
    recorded = {name: event.get(name) for name in derived} if event else None
    value = finite(event.get("eigenvalue")) if event else math.nan
    return Replayed(
        epoch=epoch,
        step=int(step) if event and math.isfinite(step := finite(event.get("step"))) else None,
        eigenvalue=value if math.isfinite(value) else None,
        **derived,
        reason=made.reason,
        cause=made.cause if made.action == "grow" else None,
        recorded=recorded,
        same=recorded is not None and all(_equal(derived[n], recorded[n]) for n in derived),
        unknown=unknown,
    )


def _equal(derived: Any, recorded: Any) -> bool:
    """Numbers up to the rounding errors of another machine."""
    if isinstance(derived, float) and isinstance(recorded, int | float):
        return math.isclose(derived, recorded, rel_tol=1e-12)
    return bool(derived == recorded)


def render(replay: Replay, console: Console) -> None:
    title = ", ".join(replay.changes) or "the run's own parameters"
    table = Table(title=title, title_justify="left")
    for name in ("epoch", "λ", "compared with", "batch", "recorded"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for decision in replay.decisions:
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
    console.print(summary(replay), soft_wrap=True)


def summary(replay: Replay) -> str:
    count, differing = text.plural(len(replay.decisions), "decision"), replay.differing
    if not differing:
        return f"{count}, all as recorded."
    summary = f"{count}, {len(differing)} different from the recorded ones, first at epoch "
    summary += f"{text.epoch(differing[0].epoch)}: {_difference(differing[0])}."
    if replay.changes:
        summary += " A run with these parameters would have had other eigenvalues from there on."
    return summary


def _difference(decision: Replayed) -> str:
    recorded = decision.recorded
    if recorded is None:
        return f"{decision.action} to batch {decision.next_batch}, no decision recorded"
    derived = asdict(decision)
    return ", ".join(
        f"{name} {_formatted(derived[name])}, recorded {_formatted(value)}"
        for name, value in recorded.items()
        if not _equal(derived[name], value)
    )


def _formatted(value: Any) -> str:
    return "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
