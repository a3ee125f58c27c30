"""`events.jsonl`: append one JSON object a line, read them back, also after a crash."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpc_absa.errors import RunDirError

Event = dict[str, Any]


def append(path: Path, event: str, phase: int, /, **fields: Any) -> Event:
    """Append one event, whole or not at all visible to readers; returns what was written.

    The line goes out in a single write on an `O_APPEND` descriptor, so lines of the supervisor and
    of rank 0 never mix. A line that a crash left unfinished is closed first.

    Raises:
        RunDirError: the file cannot be written; names path and cause.
    """
    record: Event = {"event": event, "time": time.time(), "phase": phase, **_finite(fields)}
    line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    try:
        _write(path, line)
    except OSError as error:
        raise RunDirError(f"{path}: cannot be written: {error.strerror or error}") from None
    return record


def _write(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:  # more than once only on a full disk, which the second write then reports
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)


def read(path: Path) -> list[Event]:
    """All events in the order they were written; unfinished lines are passed over."""
    return list(_lines(path))


def effective(events: list[Event]) -> list[Event]:
    """The events that count: what a crash undid (steps after the resumed checkpoint) is left out.

    A restart resumes from a checkpoint and writes `phase_start` with that checkpoint's `step`;
    `epoch`, `decision` and `checkpoint` events of later steps were lost with the crash, and the
    restarted run writes them anew.
    """
    kept: list[Event] = []
    for event in events:
        if event["event"] == "phase_start":
            kept = [e for e in kept if e.get("step", 0) <= event.get("step", 0)]
        kept.append(event)
    return kept


def _lines(path: Path) -> Iterator[Event]:
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                event = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(event, dict) and "event" in event:
                yield event


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become null, lest they break other readers."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
