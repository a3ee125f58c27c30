"""A run directory, read into the records that figures, tables and pages are made from."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from hpc_absa.errors import UsageError
from hpc_absa.report import format as fmt
from hpc_absa.report.timing import AttemptSeconds, Cost, account, by_phase, cost, finite, in_order
from hpc_absa.report.timing import total as total_seconds
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event, effective

Record = TypeVar("Record")


@dataclass(frozen=True)
class Epoch:
    epoch: float
    test_accuracy: float
    """Fraction of one; NaN if it was not measured."""


@dataclass(frozen=True)
class Decision:
    """A decision and its estimate; NaN where a number was not measured."""

    epoch: float
    eigenvalue: float
    residual: float
    converged: bool
    stopped_above_threshold: bool
    """The estimate stopped early, above the threshold: `eigenvalue` is a lower bound."""
    reference: float
    """The eigenvalue that this one was compared with (λ_ref)."""
    matvecs: float
    action: str
    reason: str
    seconds: float


@dataclass(frozen=True)
class Interruption:
    """A recorded failure, or an attempt that ended without writing anything."""

    phase: int
    time: float
    epoch: float
    """Epochs visited at the last event before it."""
    reason: str
    rank: float = math.nan
    host: str = ""
    exit_code: float = math.nan


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
    """done, resize, stopped, in_place, failed, or `open` (it still runs, or was killed)."""
    backend: str
    hosts: tuple[str, ...]
    threads_per_rank: float
    device: str
    resumed_from: str
    seconds: Mapping[str, float]
    """By category of `timing.CATEGORIES`; they add up to `wall`."""
    wall: float


@dataclass(frozen=True)
class Span:
    """A value that did not change over a span of epochs."""

    begin: float
    end: float
    value: float


@dataclass(frozen=True)
class History:
    path: Path
    events: tuple[Event, ...]
    """All of them, as `timing.in_order` sorts them."""
    kept: tuple[Event, ...]
    """Those that no crash undid."""
    job: Mapping[str, Any]
    """The resolved job; empty where `job.toml` is missing or damaged."""
    job_text: str
    epochs: tuple[Epoch, ...]
    decisions: tuple[Decision, ...]
    interruptions: tuple[Interruption, ...]
    phases: tuple[Phase, ...]
    spans: Mapping[str, tuple[Span, ...]]
    """Of `lr`, `global_batch` and `ranks`."""
    done: Event | None
    seconds: Mapping[str, float]
    """Of the whole run, by category; they add up to `wall`."""
    wall: float
    attempts: tuple[AttemptSeconds, ...]
    cost: Cost
    paused: float
    """Seconds between the first and the last event in which nothing ran."""
    first_event: float
    """Unix seconds; NaN without any."""
    last_event: float
    missing: tuple[str, ...]
    """Sentences on what the files do not contain."""

    @property
    def name(self) -> str:
        return str(self.job.get("name") or self.path.resolve().name)

    @property
    def method(self) -> str:
        """The schedule's name in the job file; empty where unknown."""
        return str(job_table(self.job, "schedule").get("method", ""))

    @property
    def epochs_wanted(self) -> float:
        return finite(job_table(self.job, "train").get("epochs"))

    @property
    def epochs_visited(self) -> float:
        """Without those that a crash undid."""
        return max((phase.epoch_end for phase in self.phases), default=0.0)

    @property
    def steps(self) -> float:
        """Optimizer steps, without those that a crash undid."""
        if self.done is not None:
            return finite(self.done.get("steps"))
        return max((phase.step_end for phase in self.phases), default=0.0)

    @property
    def test_accuracy(self) -> float:
        """The final accuracy, else the last one measured; a fraction of one."""
        final = finite((self.done or {}).get("test_accuracy"))
        values = [final, *(epoch.test_accuracy for epoch in reversed(self.epochs))]
        return next((value for value in values if math.isfinite(value)), math.nan)

    @property
    def measured(self) -> tuple[str, str]:
        """The name and the text of what shows best how good the model is."""
        if math.isfinite(self.test_accuracy):
            return "test accuracy", fmt.percent(self.test_accuracy)
        for event in reversed(self.kept):
            metrics = event.get("metrics")
            for name, value in metrics.items() if isinstance(metrics, Mapping) else ():
                if math.isfinite(finite(value)):
                    return f"test {name}", fmt.number(finite(value))
            if math.isfinite(loss := finite(event.get("test_loss"))):
                return "test loss", fmt.number(loss)
        return "test accuracy", fmt.MISSING


def load(path: Path, run: RunDir | None = None) -> History:
    """Read a run directory; raises as `require_run`.

    `run` is the directory as it was opened before: only new events are read.
    """
    run = run or require_run(path)
    events = in_order(run.log.read())
    kept = effective(events)
    job, text = read_job(run)
    parts = account(events)
    times = [time for e in events if math.isfinite(time := finite(e.get("time")))]
    epochs = tuple(_record(Epoch, e) for e in kept if e["event"] == "epoch")
    last = next((e for e in reversed(kept) if e["event"] in ("done", "phase_start")), None)
    done = last if last and last["event"] == "done" else None  # else it was continued
    of_phase: dict[int, list[Event]] = {}
    for event in kept:
        of_phase.setdefault(event["phase"], []).append(event)
    phases = tuple(_phase(own, of_phase.get(n, [])) for n, own in by_phase(parts).items())
    return History(
        path=run.path,
        events=tuple(events),
        kept=tuple(kept),
        job=job,
        job_text=text,
        epochs=epochs,
        decisions=tuple(_record(Decision, e) for e in kept if e["event"] == "decision"),
        interruptions=_interruptions(events, parts),
        phases=phases,
        spans={name: _spans(kept, name) for name in ("lr", "global_batch", "ranks")},
        done=done,
        seconds=total_seconds(part.seconds for part in parts),
        wall=sum(part.wall for part in parts),
        attempts=parts,
        cost=cost(events, parts),
        paused=sum(part.paused for part in parts),
        first_event=times[0] if times else math.nan,
        last_event=max(times, default=math.nan),
        missing=tuple(_missing(run, job, events, kept, epochs, phases, done)),
    )


def read_job(run: RunDir) -> tuple[dict[str, Any], str]:
    """The resolved job and its text; both are empty where the file is missing."""
    try:
        text = run.job.read_text(encoding="utf-8", errors="replace")
        return tomllib.loads(text), text
    except OSError:
        return {}, ""
    except tomllib.TOMLDecodeError:
        return {}, text


def require_run(path: Path) -> RunDir:
    """The run directory at `path`; a UsageError without `job.toml` and `events.jsonl` in it."""
    run = RunDir(Path(path))
    if not run.path.is_dir():
        what = "is a file" if run.path.exists() else "does not exist"
        raise UsageError(f"{path}: {what}; expected a run directory (the D of --run-dir D)")
    if not (run.job.is_file() or run.events.is_file() or run.is_script):
        raise UsageError(f"{path}: not a run directory: neither job.toml nor events.jsonl in it")
    return run


def job_table(job: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = job.get(key)
    return value if isinstance(value, Mapping) else {}


def labels(histories: Sequence[History]) -> list[str]:
    """A short name for each run, no two alike."""
    candidates = (
        [h.name for h in histories],
        [h.path.resolve().name for h in histories],
        [f"{h.name} ({h.path.resolve().name})" for h in histories],
    )
    for names in candidates:
        if len(set(names)) == len(names):
            return names
    return [str(h.path) for h in histories]


def _record(kind: type[Record], event: Event) -> Record:
    """A record from the event's fields of the same names, whatever types those have."""
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
    events: Sequence[Event], parts: Sequence[AttemptSeconds]
) -> tuple[Interruption, ...]:
    """Failures, errors, and attempts that another one followed although they never ended."""
    rows: list[Interruption] = []
    epoch = 0.0
    for event in events:
        if event["event"] in ("failure", "error"):
            rows.append(_record(Interruption, {**event, "epoch": epoch}))
        epoch = finite(event.get("epoch"), epoch)
    reason = "ended without a phase_end or a failure: the supervisor was killed too"
    for attempt in (part.attempt for part in parts[:-1]):
        if attempt.ending == "open" and all(e["event"] != "error" for e in attempt.events):
            epochs = (finite(e["epoch"]) for e in reversed(attempt.events) if "epoch" in e)
            epoch = next(epochs, math.nan)
            rows.append(Interruption(attempt.phase, attempt.end, epoch, reason))
    return tuple(sorted(rows, key=lambda row: row.time))


def _phase(parts: Sequence[AttemptSeconds], kept: Sequence[Event]) -> Phase:
    """Of all attempts at it, and of its events that no crash undid."""
    first, last = parts[0].attempt.events[0], parts[-1].attempt
    start = last.events[0]
    own = [start, *kept]
    hosts = start.get("hosts")
    return Phase(
        number=last.phase,
        ranks=finite(start.get("ranks")),
        global_batch=finite(start.get("global_batch")),
        lr=finite(start.get("lr")),
        epoch_begin=finite(first.get("epoch"), 0.0),
        epoch_end=_largest(own, "epoch"),
        step_begin=finite(first.get("step"), 0.0),
        step_end=_largest(own, "step"),
        attempts=len(parts),
        outcome=str(last.phase_end.get("outcome", "open")) if last.phase_end else last.ending,
        backend=str(start.get("backend") or ""),
        hosts=tuple(map(str, hosts)) if isinstance(hosts, list) else (),
        threads_per_rank=finite(start.get("threads_per_rank")),
        device=str(start.get("device") or ""),
        resumed_from=str(start.get("resumed_from") or ""),
        seconds=total_seconds(part.seconds for part in parts),
        wall=sum(part.wall for part in parts),
    )


def _largest(events: Sequence[Event], field: str) -> float:
    values = (finite(event.get(field)) for event in events)
    return max((value for value in values if math.isfinite(value)), default=0.0)


def _spans(kept: Sequence[Event], name: str) -> tuple[Span, ...]:
    """The values of `lr`, `global_batch` or `ranks`.

    An `epoch`, a `decision` and a `phase_end` close a span that had their value; a `phase_start`
    has the value from there on. (A decision's `lr` is the one before warm-up.)
    """
    spans: list[Span] = []
    at = value = math.nan
    for event in kept:
        epoch = finite(event.get("epoch"))
        if not math.isfinite(epoch):
            continue
        match event["event"], name:
            case ("decision", "global_batch"):
                new = finite(event.get("batch"))
            case ("decision", "lr"):
                new = math.nan
            case ("phase_start" | "epoch" | "decision" | "phase_end", _):
                new = finite(event.get(name))
            case _:
                continue
        value = new if math.isfinite(new) else value
        if event["event"] != "phase_start" and epoch > at and math.isfinite(value):
            spans.append(Span(at, epoch, value))
        # A phase may end a microbatch short of the epoch that it finished.
        at = epoch if math.isnan(at) else max(at, epoch)
    return tuple(spans)


def nonfinite_loss(events: Sequence[Event]) -> str:
    """A sentence about a loss that is infinite or NaN; empty where there is none."""
    first = next((event for event in events if event["event"] == "nonfinite_loss"), None)
    if first is None:
        return ""
    return f"The loss is not finite since step {finite(first.get('step')):.0f}."


def _missing(
    run: RunDir,
    job: Mapping[str, Any],
    events: Sequence[Event],
    kept: Sequence[Event],
    epochs: Sequence[Epoch],
    phases: Sequence[Phase],
    done: Event | None,
) -> list[str]:
    sentences: list[str] = []
    if not job and run.job.is_file():
        sentences.append("job.toml cannot be read as TOML.")
    elif not job:
        sentences.append("job.toml is missing, so the settings of the job are unknown.")
    if bad := run.log.invalid_lines:
        sentences.append(f"{bad} line(s) of events.jsonl are invalid, as a crash leaves them.")
    if not events:
        return [*sentences, "No event has been written: the run never started."]
    if sentence := nonfinite_loss(kept):
        sentences.append(sentence)
    if not phases:
        sentences.append("No phase has started.")
    elif not epochs:
        sentences.append("No epoch has been finished, so there is no accuracy.")
    if done is None:
        ending = {
            "failed": "The run is not done: its last event is a failure.",
            "error": "The run is not done: it was ended by an error.",
            "stopped": "The run is not done: it was stopped on request, with everything saved.",
            "resize": "The run is not done: the next phase has not started yet.",
            "done": "The last phase is done, but the final event of the run is missing.",
        }
        otherwise = "The run is not done: its last phase is still running, or was killed."
        last = events[-1]["event"]
        if phases or last == "error":
            outcome = "error" if last == "error" else phases[-1].outcome
            sentences.append(ending.get(outcome, otherwise))
    return sentences
