"""Where a run stands, from its files alone: also while it runs, also after a crash."""

from __future__ import annotations

import json
import math
import os
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hpc_absa.report import text
from hpc_absa.report.accounting import AttemptSeconds, account, attempts, finite, in_order
from hpc_absa.report.history import read_job, require_run
from hpc_absa.report.rank_seconds import cost
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event, effective
from hpc_absa.supervisor.standing import LinkStanding, standing

State = Literal["not started", "queued", "running", "done", "stopped", "interrupted", "failed"]

CLOCK_SLACK = 5.0
"""Seconds by which a process may seem younger than the lock it wrote (boot time is rounded)."""


@dataclass(frozen=True)
class Lock:
    """What a run directory's lock says of its holder."""

    host: str
    pid: int
    started: float
    """Unix seconds; NaN where it is not told."""
    live: bool | None
    """Whether the holder lives; None where it is on another host and cannot be asked."""


@dataclass(frozen=True)
class CheckpointFile:
    """The newest checkpoint, unopened."""

    name: str
    age_seconds: float
    bytes: int


@dataclass(frozen=True)
class Status:
    """Where a run stands; None where its files do not tell."""

    path: str
    name: str
    schedule: str
    state: State
    explanation: str
    """One sentence on the state."""
    phase: int | None
    epoch: float | None
    epochs: float | None
    """Epochs the job asks for."""
    step: int | None
    samples: int | None
    ranks: int | None
    next_ranks: int | None
    """Ranks that the next phase wants, where it has not started yet."""
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
    """Wall time in which somebody worked, pauses left out."""
    rank_seconds: float
    """What a site would charge for so far (`report.rank_seconds`)."""
    rank_seconds_of_largest: float
    """The same with the run's largest world throughout."""
    seconds_left: float | None
    """Estimate at the pace of the present phase; None where there is no pace yet."""
    last_event_age: float | None
    lock: Lock | None
    chain: tuple[LinkStanding, ...]
    """The batch jobs of launcher `slurm`, the first one first."""
    next_command: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain values, null for what is unknown or not finite."""
        return {key: _plain(value) for key, value in asdict(self).items()}


def status(path: Path, now: float | None = None) -> Status:
    """Read where the run in `path` stands; no checkpoint is opened.

    Args:
        path: The run directory.
        now: Unix seconds to count ages from; by default the present.

    Raises:
        UsageError: `path` is no folder, or holds neither `job.toml` nor `events.jsonl`.
    """
    run = require_run(path)
    now = time.time() if now is None else now
    written = in_order(run.log.read())
    kept = effective(written)
    _, job = read_job(run)
    lock = read_lock(run.lock)
    name = str(job.get("name") or run.path.resolve().name)
    chain = standing(run, name, written)
    state, explanation = _state(written, lock, chain, now)
    if state == "running" and run.stop_request.exists():
        explanation += " It was asked to stop, and is saving."
    parts = account(written)
    last_seen = max((finite(e.get("time"), 0.0) for e in written), default=math.nan)
    epochs = finite(_section(job, "train").get("epochs"))
    epoch = _epochs_visited(kept)
    failures = [event for event in written if event["event"] == "failure"]
    spent = cost(written)
    used = sum(part.wall for part in parts)
    used += max(0.0, now - last_seen) if state == "running" and written else 0.0
    return Status(
        path=str(run.path),
        name=name,
        schedule=str(_section(job, "schedule").get("method", "")),
        state=state,
        explanation=explanation,
        phase=_whole(_latest(written, "phase")),
        epoch=_known(epoch),
        epochs=_known(epochs),
        step=_whole(_latest(kept, "step", "steps")),
        samples=_whole(_latest(kept, "samples")),
        ranks=_whole(_latest(kept, "ranks")),
        next_ranks=_next_ranks(kept),
        global_batch=_whole(_latest(kept, "global_batch")),
        lr=_known(_latest(kept, "lr")),
        eigenvalue=_known(_latest(kept, "eigenvalue")),
        reference=_known(_latest(kept, "reference")),
        last_decision=next((_reason(e) for e in reversed(kept) if e["event"] == "decision"), None),
        test_accuracy=_known(_latest(kept, "test_accuracy")),
        train_loss=_known(_latest(kept, "train_loss")),
        checkpoint=newest_checkpoint(run, now),
        failures=len(failures),
        last_failure=_failure(failures[-1]) if failures else None,
        seconds_used=used,
        rank_seconds=spent.charged,
        rank_seconds_of_largest=spent.largest,
        seconds_left=_seconds_left(state, parts, kept, epoch, epochs),
        last_event_age=_known(now - last_seen),
        lock=lock,
        chain=chain,
        next_command=_next_command(state, run),
    )


def read_lock(path: Path) -> Lock | None:
    """The lock's content and whether its holder lives; None without a readable lock.

    The lock itself is not tried: even a moment of holding it could turn a starting run away.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(told, dict) or not isinstance(told.get("pid"), int):
        return None
    host, pid, started = str(told.get("host", "")), int(told["pid"]), finite(told.get("started"))
    live = _lives(pid, started) if host == socket.gethostname() else None
    return Lock(host, pid, started, live)


def newest_checkpoint(run: RunDir, now: float) -> CheckpointFile | None:
    """The last checkpoint by name; it is not opened, `hpc-absa verify` does that."""
    try:
        names = [e for e in os.scandir(run.checkpoints) if e.name.endswith(".h5")]
        names = [entry for entry in names if not entry.name.startswith(".")]
        entry = max(names, key=lambda e: e.name, default=None)
        found = entry.stat() if entry else None
    except OSError:
        return None
    if entry is None or found is None:
        return None
    return CheckpointFile(entry.name, max(0.0, now - found.st_mtime), found.st_size)


def _lives(pid: int, started: float) -> bool:
    """Whether the process that wrote the lock lives, not a zombie nor a later one of its number."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        booted = next(
            float(line.split()[1])
            for line in Path("/proc/stat").read_text().splitlines()
            if line.startswith("btime ")
        )
    except (OSError, StopIteration, ValueError):
        return True
    born = booted + float(words[19]) / os.sysconf("SC_CLK_TCK")
    return words[0] not in "ZX" and not born > started + CLOCK_SLACK


def _state(
    written: Sequence[Event], lock: Lock | None, chain: Sequence[LinkStanding], now: float
) -> tuple[State, str]:
    if _last_word(written) == "done":
        return "done", "The job is done."
    if chain and chain[-1].alive:
        last = chain[-1]
        waits = f" for {last.waits_for}" if last.waits_for not in (None, "None") else ""
        if last.state == "pending":
            return "queued", f"Job {last.job_id}, link {last.link} of its chain, waits{waits}."
        return "running", f"Job {last.job_id}, link {last.link} of its chain, is {last.state}."
    if chain and chain[-1].alive is None and chain[-1].state == "submitted":
        return "queued", f"Job {chain[-1].job_id} was submitted; Slurm cannot be asked from here."
    if lock is not None and lock.live:
        return "running", f"Process {lock.pid} on {lock.host} works on it."
    if lock is not None and lock.live is None:
        return _elsewhere(written, lock, now)
    return _at_rest(written)


def _last_word(written: Sequence[Event]) -> str:
    """How the log ends: `done`, `failure`, a phase's outcome, `at work`, or nothing at all."""
    for event in reversed(written):
        kind = str(event["event"])
        if kind in ("done", "failure"):
            return kind
        if kind == "phase_end":
            return f"phase {event.get('outcome', 'in_place')}"
        if kind in ("phase_start", "epoch", "decision", "resize"):
            return "at work"
    return ""


def _elsewhere(written: Sequence[Event], lock: Lock, now: float) -> tuple[State, str]:
    """The holder is on another host; it is believed, unless the events came to an end since."""
    last = max((finite(e.get("time"), 0.0) for e in written), default=math.nan)
    if _last_word(written) == "phase stopped" and last >= lock.started:
        return _at_rest(written)
    seen = f"; last event {text.duration(max(0.0, now - last))} ago" if written else ""
    return "running", (
        f"According to its lock, process {lock.pid} on {lock.host} works on it, "
        f"which cannot be checked from {socket.gethostname()}{seen}."
    )


def _at_rest(written: Sequence[Event]) -> tuple[State, str]:
    """Nobody holds the lock."""
    word = _last_word(written)
    if not word:
        return "not started", "No event has been written yet."
    if word == "phase stopped":
        return "stopped", "Stopped on request, with everything saved."
    if word == "phase resize":
        return "stopped", "Between two phases: everything is saved, nobody has gone on yet."
    if word == "failure":
        failure = next(e for e in reversed(written) if e["event"] == "failure")
        return "failed", f"Ended by a failure: {_failure(failure)}."
    return "interrupted", "Nobody works on it, and it did not say why: killed, or the host went."


def _next_ranks(kept: Sequence[Event]) -> int | None:
    for event in reversed(kept):
        if event["event"] == "phase_start":
            return None
        if event["event"] == "phase_end":
            return _whole(finite(event.get("next_ranks")))
    return None


def _seconds_left(
    state: State,
    parts: Sequence[AttemptSeconds],
    kept: Sequence[Event],
    epoch: float,
    epochs: float,
) -> float | None:
    """Epochs left at the pace of the last attempt that got anywhere."""
    left = epochs - epoch
    if state == "done":
        return 0.0
    if not math.isfinite(left) or not parts:
        return None
    for attempt in reversed(attempts(kept)):
        seen = [(finite(e.get("epoch")), finite(e.get("time"))) for e in attempt.events]
        seen = [(x, t) for x, t in seen if math.isfinite(x) and math.isfinite(t)]
        if seen and seen[-1][0] > seen[0][0] and seen[-1][1] > seen[0][1]:
            pace = (seen[-1][1] - seen[0][1]) / (seen[-1][0] - seen[0][0])
            return max(0.0, left * pace)
    return None


def _next_command(state: State, run: RunDir) -> str | None:
    if state in ("running", "queued"):
        return None
    folder = shlex.quote(str(run.path))
    if state == "done":
        return f"hpc-absa report {folder}"
    return f"hpc-absa run {shlex.quote(str(run.job))} --run-dir {folder}"


def _failure(event: Event) -> str:
    where = [f"rank {event['rank']}"] if event.get("rank") is not None else []
    where += [f"on {event['host']}"] if event.get("host") else []
    where += [f"exit code {event['exit_code']}"] if event.get("exit_code") is not None else []
    reason = str(event.get("reason") or "no reason given")
    return f"{reason} ({', '.join(where)})" if where else reason


def _reason(event: Event) -> str:
    return str(event.get("reason") or event.get("action") or "")


def _section(job: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = job.get(key)
    return value if isinstance(value, Mapping) else {}


def _latest(events: Sequence[Event], *names: str) -> float:
    """The last finite value of a field in any event."""
    for event in reversed(events):
        for name in names:
            value = finite(event.get(name))
            if math.isfinite(value):
                return value
    return math.nan


def _epochs_visited(kept: Sequence[Event]) -> float:
    told = [finite(event.get("epoch")) for event in kept]
    told += [finite(event.get("epochs")) for event in kept if event["event"] == "done"]
    return max((epoch for epoch in told if math.isfinite(epoch)), default=math.nan)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _whole(value: float) -> int | None:
    return int(value) if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value
