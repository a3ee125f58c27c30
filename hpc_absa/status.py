"""Where a run stands, from its files alone: also while it runs, also after a crash.

Neither torch nor HDF5 is imported, so that the answer comes quickly.
"""

from __future__ import annotations

import math
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from hpc_absa.report import format as fmt
from hpc_absa.report.history import History, load, nonfinite_loss
from hpc_absa.report.timing import attempts, finite, latest
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event, nan_as_none
from hpc_absa.rundir.lock import LockHolder, host, read_lock
from hpc_absa.supervisor.chain import LinkStatus, chain_status

State = Literal["not started", "queued", "running", "done", "stopped", "interrupted", "failed"]

STATE_STYLES: Mapping[State, str] = {
    "not started": "bold",
    "queued": "bold blue",
    "running": "bold blue",
    "done": "bold green",
    "stopped": "bold yellow",
    "interrupted": "bold red",
    "failed": "bold red",
}

ACTIVE: tuple[State, ...] = ("queued", "running")
"""States in which a run may still change by itself."""


@dataclass(frozen=True)
class CheckpointFile:
    """The newest checkpoint; it is not opened, `hpc-absa verify` does that."""

    name: str
    age_seconds: float
    bytes: int


@dataclass(frozen=True)
class Status:
    path: str
    name: str
    schedule: str
    state: State
    explanation: str
    """One sentence on the state."""
    phase: int | None
    epoch: float | None
    epochs: float | None
    """Epochs that the job asks for."""
    step: int | None
    samples: int | None
    ranks: int | None
    next_ranks: int | None
    """Ranks of the next phase, if it has not started yet."""
    global_batch: int | None
    lr: float | None
    eigenvalue: float | None
    reference: float | None
    last_decision: str | None
    test_accuracy: float | None
    """Fraction of one."""
    train_loss: float | None
    checkpoint: CheckpointFile | None
    failures: int
    last_failure: str | None
    seconds_used: float
    """Wall time without pauses."""
    rank_seconds: float
    """What a site would charge for so far (`report.timing.Cost`)."""
    rank_seconds_of_largest: float
    """The same with the run's largest number of ranks throughout."""
    seconds_left: float | None
    """Estimate at the speed of the present phase; None before it has one."""
    last_event_age: float | None
    lock: LockHolder | None
    chain: tuple[LinkStatus, ...]
    """The batch jobs of launcher `slurm`, the first one first."""
    next_command: str | None

    def to_dict(self) -> dict[str, Any]:
        return nan_as_none(asdict(self))


def status(path: Path, now: float | None = None, history: History | None = None) -> Status:
    """Read where the run in `path` stands; no checkpoint is opened.

    Args:
        path: the run directory.
        now: Unix seconds that ages are relative to; by default the present.
        history: of the run, where it has been read already.

    Raises:
        UsageError: `path` is not a run directory.
    """
    history = history or load(path)
    run, events, kept = RunDir(history.path), history.events, history.kept
    now = time.time() if now is None else now
    lock = read_lock(run.lock)
    chain = chain_status(run, events)
    state, explanation = _state(history, lock, chain, now)
    if state == "running" and run.stop_request.exists():
        explanation += " It was asked to stop, and is saving."
    if sentence := nonfinite_loss(history.kept):
        explanation += f" {sentence}"
    age = now - history.last_event
    epoch = history.epochs_visited if history.phases else math.nan
    last = history.decisions[-1] if history.decisions else None
    failures = [event for event in events if event["event"] == "failure"]
    left = seconds_left(kept, history.epochs_wanted - epoch)
    return Status(
        path=str(run.path),
        name=history.name,
        schedule=history.method,
        state=state,
        explanation=explanation,
        phase=_int(latest(events, "phase")),
        epoch=_known(epoch),
        epochs=_known(history.epochs_wanted),
        step=_int(latest(kept, "step", "steps")),
        samples=_int(latest(kept, "samples")),
        ranks=_int(latest(kept, "ranks")),
        next_ranks=_next_ranks(kept),
        global_batch=_int(latest(kept, "global_batch")),
        lr=_known(latest(kept, "lr")),
        eigenvalue=_known(latest(kept, "eigenvalue")),
        reference=_known(latest(kept, "reference")),
        last_decision=last.reason or last.action if last else None,
        test_accuracy=_known(history.test_accuracy),
        train_loss=_known(latest(kept, "train_loss")),
        checkpoint=_newest_checkpoint(run, now),
        failures=len(failures),
        last_failure=_failure(failures[-1]) if failures else None,
        seconds_used=history.wall + (max(0.0, age) if state == "running" and events else 0.0),
        rank_seconds=history.cost.charged,
        rank_seconds_of_largest=history.cost.largest,
        seconds_left=0.0 if state == "done" else left,
        last_event_age=_known(age),
        lock=lock,
        chain=chain,
        next_command=_next_command(state, run, events),
    )


def _newest_checkpoint(run: RunDir, now: float) -> CheckpointFile | None:
    for path in reversed(run.checkpoint_files()):
        try:
            stat = path.stat()
        except OSError:  # removed since it was listed
            continue
        return CheckpointFile(path.name, max(0.0, now - stat.st_mtime), stat.st_size)
    return None


def _state(
    history: History, lock: LockHolder | None, chain: Sequence[LinkStatus], now: float
) -> tuple[State, str]:
    ending = _ending(history.events)
    if ending == "nonfinite_loss" and not (lock and lock.live):
        return "failed", "Ended because of its loss."
    if ending == "done":
        return "done", "The job is done."
    if chain:
        last = chain[-1]
        job = f"Job {last.job_id}, link {last.link} of its chain,"
        if last.alive and last.state == "pending":
            waits = f" for {last.waits_for}" if last.waits_for not in (None, "None") else ""
            return "queued", f"{job} waits{waits}."
        if last.alive:
            return "running", f"{job} is {last.state}."
        if last.alive is None and last.state == "submitted":
            return "queued", f"Job {last.job_id} was submitted; Slurm cannot be asked from here."
    if lock is not None and lock.live:
        return "running", f"Process {lock.pid} on {lock.host} is running it."
    stopped_since = lock and ending == "stopped" and history.last_event >= lock.started
    if lock is not None and lock.live is None and not stopped_since:  # on another host
        age = f"; last event {_ago(now - history.last_event)}" if history.events else ""
        return "running", (
            f"According to its lock, process {lock.pid} on {lock.host} is running it, "
            f"which cannot be checked from {host()}{age}."
        )
    if ending == "failure":
        failure = next(e for e in reversed(history.events) if e["event"] == "failure")
        return "failed", f"Ended by a failure: {_failure(failure)}."
    if ending == "error":
        error = next(e for e in reversed(history.events) if e["event"] == "error")
        return "failed", f"Ended by an error: {error.get('reason')}"
    idle: dict[str, tuple[State, str]] = {
        "": ("not started", "No event has been written yet."),
        "stopped": ("stopped", "Stopped on request, with everything saved."),
        "resize": ("stopped", "Between two phases: everything is saved, nothing is running."),
    }
    reason = "Nothing is running, and no reason was written: it was killed, or its host failed."
    return idle.get(ending, ("interrupted", reason))


def _ending(events: Sequence[Event]) -> str:
    """How the log ends: an event or an outcome, else `open`; "" before a start."""
    for event in reversed(events):
        if event["event"] in ("done", "failure", "error"):
            return str(event["event"])
        if event["event"] == "nonfinite_loss" and event.get("action") == "stop":
            return "nonfinite_loss"
        if event["event"] == "phase_end" and event.get("outcome") in ("stopped", "resize"):
            return str(event["outcome"])
        if event["event"] in ("phase_start", "phase_end", "epoch", "decision", "resize"):
            return "open"
    return ""


def _next_ranks(kept: Sequence[Event]) -> int | None:
    limits = (e for e in reversed(kept) if e["event"] in ("phase_start", "phase_end"))
    return _int(finite(next(limits, {}).get("next_ranks")))  # only a phase_end has the field


def seconds_left(kept: Sequence[Event], epochs_left: float) -> float | None:
    """The remaining epochs at the speed of the last attempt that made progress."""
    if not math.isfinite(epochs_left):
        return None
    for attempt in reversed(attempts(kept)):
        points = [(finite(e.get("epoch")), finite(e.get("time"))) for e in attempt.events]
        points = [(x, t) for x, t in points if math.isfinite(x) and math.isfinite(t)]
        if points and points[-1][0] > points[0][0] and points[-1][1] > points[0][1]:
            (epoch, begin), (last_epoch, end) = points[0], points[-1]
            return max(0.0, epochs_left * (end - begin) / (last_epoch - epoch))
    return None


def _next_command(state: State, run: RunDir, events: Sequence[Event]) -> str | None:
    if state in ("running", "queued"):
        return None
    folder = shlex.quote(str(run.path))
    if state == "done":
        return f"hpc-absa report {folder}"
    if run.is_script:
        return f"hpc-absa launch --run-dir {folder}"
    start = next((e for e in reversed(events) if e["event"] == "phase_start"), {})
    if command := start.get("command"):  # of a script that was started by hand
        command = (
            f"mpirun -np {ranks} {command}" if (ranks := start.get("ranks", 1)) != 1 else command
        )
        directory = str(start.get("directory"))
        elsewhere = directory != os.getcwd()
        return f"cd {shlex.quote(directory)} && {command}" if elsewhere else str(command)
    return f"hpc-absa run {shlex.quote(str(run.job))} --run-dir {folder}"


def _failure(event: Event) -> str:
    titles = {"rank": "rank", "host": "on", "exit_code": "exit code"}
    known = {key: event.get(key) for key in titles if event.get(key) not in (None, "")}
    where = [f"{titles[key]} {value}" for key, value in known.items()]
    reason = str(event.get("reason") or "no reason given")
    return f"{reason} ({', '.join(where)})" if where else reason


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _int(value: float) -> int | None:
    return int(value) if math.isfinite(value) else None


def render(now: Status, console: Console) -> None:
    console.print(block(now))
    if now.next_command:
        # No wrapping: a command that is broken over lines cannot be copied.
        command = Text.assemble("Next: ", (now.next_command, "bold"))
        console.print(command, soft_wrap=True, highlight=False)


def block(now: Status) -> Group:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in _lines(now).items():
        if text and text != fmt.MISSING:
            grid.add_row(name, Text(text))
    title = Text.assemble((now.name, "bold"), "  ", (now.state, STATE_STYLES[now.state]))
    return Group(title, Text(now.explanation, style="dim"), grid)


def _lines(now: Status) -> dict[str, str]:
    """Title and text of each line; empty or a dash for what is unknown."""
    epoch, ranks = fmt.epoch(now.epoch), fmt.count(now.ranks)
    eigenvalue = checkpoint = left = spent = ""
    if now.epoch is not None and now.epochs:
        epoch += f" of {fmt.epoch(now.epochs)}"
    if now.ranks is not None and now.next_ranks not in (None, now.ranks) and now.state != "done":
        ranks += f", next phase {now.next_ranks}"
    if now.eigenvalue is not None:
        eigenvalue = f"λ {fmt.number(now.eigenvalue)}"
        eigenvalue += "" if now.reference is None else f", reference {fmt.number(now.reference)}"
    if file := now.checkpoint:
        checkpoint = f"{file.name}, {fmt.size(file.bytes)}, {_ago(file.age_seconds)}"
    if now.seconds_left is not None and now.state != "done":
        left = f"about {fmt.duration(now.seconds_left)} at the present speed"
    if now.rank_seconds_of_largest > 0:
        largest = f"{now.rank_seconds_of_largest:.0f} with the largest number of ranks throughout"
        spent = f"{now.rank_seconds:.0f} ({largest})"
    return {
        "schedule": now.schedule,
        "phase": "" if now.phase is None else str(now.phase),
        "epoch": epoch,
        "step": fmt.count(now.step),
        "samples": fmt.count(now.samples),
        "ranks": ranks,
        "global batch": fmt.count(now.global_batch),
        "learning rate": fmt.number(now.lr),
        "eigenvalue": eigenvalue,
        "last decision": now.last_decision or "",
        "test accuracy": fmt.percent(now.test_accuracy),
        "checkpoint": checkpoint,
        "failures": f"{now.failures}, last: {now.last_failure}" if now.failures else "",
        "time used": fmt.duration(now.seconds_used) if now.phase is not None else "",
        "time left": left,
        "rank-seconds": spent,
        "last event": "" if now.last_event_age is None else _ago(now.last_event_age),
        "chain": "\n".join(map(_link, now.chain)),
    }


def _ago(seconds: float) -> str:
    return f"{fmt.duration(max(0.0, seconds))} ago"


def _link(link: LinkStatus) -> str:
    size = f"{fmt.plural(link.nodes, 'node')}, {fmt.plural(link.ranks, 'rank')}"
    return f"link {link.link}, job {link.job_id} ({link.name}), {size}: {link.state}"
