"""A run directory, read once into frozen records that figures, tables and pages are made from."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from hpc_absa.errors import UsageError
from hpc_absa.report.accounting import AttemptSeconds, account, finite, in_order, total
from hpc_absa.report.rank_seconds import Cost, cost
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event, effective

Row = TypeVar("Row")


@dataclass(frozen=True)
class Epoch:
    """A finished epoch; NaN where a number was not measured."""

    phase: int
    time: float
    epoch: float
    step: float
    samples: float
    train_loss: float
    test_loss: float
    test_accuracy: float
    """Fraction of one."""
    lr: float
    global_batch: float
    ranks: float
    samples_per_second: float


@dataclass(frozen=True)
class DecisionPoint:
    """A decision and the evidence it stood on; NaN where a number was not measured."""

    phase: int
    time: float
    epoch: float
    step: float
    eigenvalue: float
    residual: float
    converged: bool
    stopped_above_threshold: bool
    """The estimate ended early, above the threshold: `eigenvalue` is as far as it came."""
    reference: float
    """Eigenvalue that this one was compared with (λ_ref)."""
    matvecs: float
    hessian_samples: float
    action: str
    reason: str
    batch: float
    next_batch: float
    ranks: float
    next_ranks: float
    lr: float
    next_lr: float
    seconds: float


@dataclass(frozen=True)
class Interruption:
    """A failure that was written down, or an attempt that ended without a word."""

    phase: int
    time: float
    epoch: float
    """Epochs visited at the last event before it."""
    reason: str
    rank: float
    host: str
    exit_code: float
    silent: bool
    """Nothing was written: supervisor and ranks ended together."""


@dataclass(frozen=True)
class Phase:
    """A phase, all attempts at it together."""

    number: int
    ranks: float
    global_batch: float
    lr: float
    epoch_begin: float
    epoch_end: float
    step_begin: float
    step_end: float
    attempts: int
    outcome: str
    """done, resize, stopped, in_place, failed, or `open` where nothing tells."""
    backend: str
    hosts: tuple[str, ...]
    threads_per_rank: float
    device: str
    resumed_from: str
    seconds: Mapping[str, float]
    """By category of `accounting.CATEGORIES`; they add up to `wall`."""
    wall: float


@dataclass(frozen=True)
class Held:
    """A value that was in force over a span of epochs."""

    begin: float
    end: float
    value: float


@dataclass(frozen=True)
class History:
    """Everything about a run that its files tell."""

    path: Path
    job: Mapping[str, Any]
    """The resolved job; empty where `job.toml` is missing or damaged."""
    job_text: str
    epochs: tuple[Epoch, ...]
    decisions: tuple[DecisionPoint, ...]
    interruptions: tuple[Interruption, ...]
    phases: tuple[Phase, ...]
    lr: tuple[Held, ...]
    global_batch: tuple[Held, ...]
    ranks: tuple[Held, ...]
    resizes: tuple[Event, ...]
    done: Event | None
    seconds: Mapping[str, float]
    """Of the whole run, by category; they add up to `wall`."""
    wall: float
    cost: Cost
    """In rank-seconds."""
    paused: float
    """Seconds between the first and the last event in which nobody worked."""
    began: float
    """Unix seconds of the first event; NaN without any."""
    last_seen: float
    missing: tuple[str, ...]
    """Sentences on what the files do not tell."""

    @property
    def name(self) -> str:
        """The job's name, else the folder's."""
        return str(self.job.get("name") or self.path.resolve().name)

    @property
    def method(self) -> str:
        """The schedule's name in the job file; empty where unknown."""
        return str(_table(self.job, "schedule").get("method", ""))

    @property
    def epochs_wanted(self) -> float:
        """Epochs the job asks for; NaN where unknown."""
        return finite(_table(self.job, "train").get("epochs"))

    @property
    def epochs_visited(self) -> float:
        """Epochs visited by the work that counts."""
        return max((phase.epoch_end for phase in self.phases), default=0.0)

    @property
    def steps(self) -> float:
        """Optimizer steps that count."""
        if self.done is not None:
            return finite(self.done.get("steps"))
        return max((phase.step_end for phase in self.phases), default=0.0)

    @property
    def test_accuracy(self) -> float:
        """The final accuracy, else the last one measured; a fraction of one."""
        final = finite((self.done or {}).get("test_accuracy"))
        if math.isfinite(final):
            return final
        measured = [e.test_accuracy for e in self.epochs if math.isfinite(e.test_accuracy)]
        return measured[-1] if measured else math.nan


def load(path: Path) -> History:
    """Read a run directory.

    Raises:
        UsageError: `path` is no folder, or holds neither `job.toml` nor `events.jsonl`.
    """
    run = require_run(path)
    written = in_order(run.log.read())
    kept = effective(written)
    text, job = read_job(run)
    parts = account(written)
    epochs = tuple(_row(Epoch, e) for e in kept if e["event"] == "epoch")
    times = [finite(e.get("time")) for e in written]
    done = next((e for e in reversed(kept) if e["event"] == "done"), None)
    phases = _phases(parts, kept)
    return History(
        path=run.path,
        job=job,
        job_text=text,
        epochs=epochs,
        decisions=tuple(_row(DecisionPoint, e) for e in kept if e["event"] == "decision"),
        interruptions=_interruptions(written, parts),
        phases=phases,
        lr=_held(kept, "lr"),
        global_batch=_held(kept, "global_batch"),
        ranks=_held(kept, "ranks"),
        resizes=tuple(e for e in kept if e["event"] == "resize"),
        done=done,
        seconds=total(part.seconds for part in parts),
        wall=sum(part.wall for part in parts),
        cost=cost(written),
        paused=sum(part.paused for part in parts),
        began=times[0] if times else math.nan,
        last_seen=max(times, default=math.nan),
        missing=tuple(_missing(run, job, written, epochs, phases, done)),
    )


def require_run(path: Path) -> RunDir:
    """The run directory at `path`.

    Raises:
        UsageError: it is no folder, or holds neither `job.toml` nor `events.jsonl`.
    """
    run = RunDir(Path(path))
    if not run.path.is_dir():
        what = "is a file" if run.path.exists() else "does not exist"
        raise UsageError(f"{path}: {what}; expected a run directory (the D of --run-dir D)")
    if not (run.job.is_file() or run.events.is_file()):
        raise UsageError(f"{path}: not a run directory: neither job.toml nor events.jsonl in it")
    return run


def read_job(run: RunDir) -> tuple[str, dict[str, Any]]:
    """The resolved job as text and as tables; empty tables where it cannot be read."""
    try:
        text = run.job.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", {}
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return text, {}


def labels(histories: Sequence[History]) -> list[str]:
    """A short name for each run, no two alike: what tells them apart."""
    candidates = (
        [h.name for h in histories],
        [h.path.resolve().name for h in histories],
        [f"{h.name} ({h.path.resolve().name})" for h in histories],
    )
    for names in candidates:
        if len(set(names)) == len(names):
            return names
    return [str(h.path) for h in histories]


def unfinished_lines(path: Path) -> int:
    """Lines of an event log that are no events (a crash cut one short)."""
    if not path.is_file():
        return 0
    bad = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line) if line.strip() else {"event": ""}
        except json.JSONDecodeError:
            event = None
        bad += not (isinstance(event, dict) and "event" in event)
    return bad


def _table(job: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = job.get(key)
    return value if isinstance(value, Mapping) else {}


def _row(kind: type[Row], event: Event) -> Row:
    """A frozen record from an event's fields of the same names."""
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        value = event.get(field.name)
        if field.type == "float":
            values[field.name] = finite(value)
        elif field.type == "int":
            values[field.name] = int(finite(value, 0))
        elif field.type == "bool":
            values[field.name] = bool(value)
        else:
            values[field.name] = "" if value is None else str(value)
    return kind(**values)


def _interruptions(
    written: Sequence[Event], parts: Sequence[AttemptSeconds]
) -> tuple[Interruption, ...]:
    """Failures in the log, and attempts that another followed although they never ended."""
    found: list[Interruption] = []
    epoch = 0.0
    for event in written:
        if event["event"] == "failure":
            row = {**event, "epoch": epoch, "silent": False}
            found.append(_row(Interruption, row))
        epoch = finite(event.get("epoch"), epoch)
    for part in parts[:-1]:
        attempt = part.attempt
        if attempt.ending == "open":
            seen = [finite(e.get("epoch")) for e in attempt.events if "epoch" in e]
            row = {
                "phase": attempt.phase,
                "time": attempt.end,
                "epoch": seen[-1] if seen else None,
                "reason": "ended without a word; whoever ran it was killed too",
                "silent": True,
            }
            found.append(_row(Interruption, row))
    return tuple(sorted(found, key=lambda row: row.time))


def _phases(parts: Sequence[AttemptSeconds], kept: Sequence[Event]) -> tuple[Phase, ...]:
    numbers = dict.fromkeys(part.attempt.phase for part in parts)
    return tuple(
        _phase([part for part in parts if part.attempt.phase == number], kept) for number in numbers
    )


def _phase(parts: Sequence[AttemptSeconds], kept: Sequence[Event]) -> Phase:
    first, last = parts[0].attempt, parts[-1].attempt
    start = last.events[0]
    mine = [e for e in kept if e.get("phase") == last.phase]
    epochs = [finite(e.get("epoch")) for e in (start, *mine) if "epoch" in e]
    steps = [finite(e.get("step")) for e in (start, *mine) if "step" in e]
    hosts = start.get("hosts")
    end = last.phase_end if last.ending == "ended" else None
    return Phase(
        number=last.phase,
        ranks=finite(start.get("ranks")),
        global_batch=finite(start.get("global_batch")),
        lr=finite(start.get("lr")),
        epoch_begin=finite(first.events[0].get("epoch"), 0.0),
        epoch_end=max((e for e in epochs if math.isfinite(e)), default=0.0),
        step_begin=finite(first.events[0].get("step"), 0.0),
        step_end=max((s for s in steps if math.isfinite(s)), default=0.0),
        attempts=len(parts),
        outcome=str(end.get("outcome", "open")) if end else last.ending,
        backend=str(start.get("backend") or ""),
        hosts=tuple(map(str, hosts)) if isinstance(hosts, list) else (),
        threads_per_rank=finite(start.get("threads_per_rank")),
        device=str(start.get("device") or ""),
        resumed_from=str(start.get("resumed_from") or ""),
        seconds=total(part.seconds for part in parts),
        wall=sum(part.wall for part in parts),
    )


def _held(kept: Sequence[Event], name: str) -> tuple[Held, ...]:
    """The spans over which `lr`, `global_batch` or `ranks` held, from what each event tells.

    An `epoch`, a `decision` and a `phase_end` close a span that had their value; a `phase_start`
    says which value holds from there on. (A decision's `lr` is the one before warm-up.)
    """
    spans: list[Held] = []
    at, value = math.nan, math.nan
    for event in kept:
        x = finite(event.get("epoch"))
        if not math.isfinite(x) or event["event"] not in _SPANNED:
            continue
        told = _told(event, name)
        if event["event"] != "phase_start":
            value = told if math.isfinite(told) else value
            if math.isfinite(at) and x > at and math.isfinite(value):
                spans.append(Held(at, x, value))
        elif math.isfinite(told):
            value = told
        # A phase may end a microbatch short of the epoch that it has finished.
        at = x if math.isnan(at) else max(at, x)
    return tuple(spans)


_SPANNED = ("phase_start", "epoch", "decision", "phase_end")


def _told(event: Event, name: str) -> float:
    if event["event"] == "decision" and name != "ranks":
        return finite(event.get("batch")) if name == "global_batch" else math.nan
    return finite(event.get(name))


def _missing(
    run: RunDir,
    job: Mapping[str, Any],
    written: Sequence[Event],
    epochs: Sequence[Epoch],
    phases: Sequence[Phase],
    done: Event | None,
) -> list[str]:
    """What a reader would look for and not find, one sentence each."""
    said: list[str] = []
    if not job:
        said.append(
            "job.toml cannot be read as TOML."
            if run.job.is_file()
            else "job.toml is not there, so the job's own settings are unknown."
        )
    bad = unfinished_lines(run.events)
    if bad:
        said.append(f"{bad} line(s) of events.jsonl are unfinished, as a crash leaves them.")
    if not written:
        return [*said, "No event has been written: the run never started."]
    if not phases:
        said.append("No phase has started.")
    if phases and not epochs:
        said.append("No epoch has been finished, so there is no accuracy.")
    if done is None:
        said.append(_how_it_stands(phases))
    return said


def _how_it_stands(phases: Sequence[Phase]) -> str:
    outcome = phases[-1].outcome if phases else "open"
    return {
        "failed": "The run is not done: its last event is a failure.",
        "stopped": "The run is not done: it was stopped on request, with everything saved.",
        "resize": "The run is not done: the next phase has not started yet.",
        "done": "The last phase is done, but the run's final event is not written.",
    }.get(outcome, "The run is not done: its last phase is still running, or was killed.")
