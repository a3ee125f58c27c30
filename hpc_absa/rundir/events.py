"""`events.jsonl`: one JSON object a line, appended by rank 0 and by the supervisor."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from pathlib import Path
from typing import Any

from hpc_absa.errors import RunDirError

Event = dict[str, Any]

FORMER_NAMES = {"stopped_above_threshold": "settled"}
"""Fields that have a new name; written under both for one release, read under either."""


class EventLog:
    """The events of one run. Reading continues where the previous call ended."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.invalid_lines = 0
        """Complete lines read so far that are not events, such as one that a crash cut off."""
        self._events: list[Event] = []
        self._offset = 0
        self._first_line = b""
        self._lock = threading.Lock()  # a supervisor reads in several threads

    def append(self, event: str, phase: int | None = None, /, **fields: Any) -> Event:
        """Append one event; returns what was written.

        The line is one write on an `O_APPEND` descriptor, so lines of two processes do not mix.
        A line that a crash left unfinished is ended first.

        Args:
            event: its kind.
            phase: the phase it belongs to; None for the phase of the last event, or 1.
            fields: its other fields; NaN and infinity are written as null.

        Raises:
            RunDirError: the file cannot be written; names path and cause.
        """
        if phase is None:
            last = self.last()
            phase = last["phase"] if last else 1
        record: Event = {"event": event, "time": time.time(), "phase": phase, **nan_as_none(fields)}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        try:
            _append(self.path, line)
        except OSError as error:
            raise RunDirError(
                f"{self.path}: cannot be written: {error.strerror or error}"
            ) from None
        return record

    def read(self) -> list[Event]:
        """All events so far, in the order they were written; only new lines are parsed."""
        with self._lock:
            return self._read()

    def _read(self) -> list[Event]:
        try:
            with self.path.open("rb") as file:
                if file.readline() != self._first_line:  # another run's file under this name
                    self._events, self._offset, self.invalid_lines = [], 0, 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:  # removed, as by --fresh
            self._events, self._offset, self.invalid_lines = [], 0, 0
            return self._events
        except OSError:
            return self._events
        complete = text[: text.rfind(b"\n") + 1]
        if self._offset == 0:
            self._first_line = complete[: complete.find(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            if event := _parse(line):
                self._events.append(event)
            elif line.strip():
                self.invalid_lines += 1
        return self._events

    def last(self, *kinds: str) -> Event | None:
        """The last event of these kinds, of any kind if none is named; None where there is none."""
        return next((e for e in reversed(self.read()) if not kinds or e["event"] in kinds), None)


def effective(events: list[Event]) -> list[Event]:
    """The events without those that a crash undid.

    A restart resumes from a checkpoint and writes `phase_start` with that checkpoint's `step`;
    `epoch`, `decision` and `checkpoint` events of later steps were lost with the crash, and the
    restarted run writes them again.
    """
    kept: list[Event] = []
    highest: float = 0
    for event in events:
        step = _number(event.get("step"))
        if event["event"] == "phase_start" and step < highest:
            kept = [e for e in kept if _number(e.get("step")) <= step]
            highest = step
        kept.append(event)
        highest = max(highest, step)
    return kept


def _parse(line: bytes) -> Event | None:
    """The event on a line; None for what other programs wrote and what is not complete."""
    try:
        event = json.loads(line.decode("utf-8", "replace"))
        if not isinstance(event["event"], str) or type(event["phase"]) is not int:  # nor a bool
            return None
    except (ValueError, KeyError, TypeError):  # the last for what is no table
        return None
    for new, old in FORMER_NAMES.items():
        if old in event:
            event.setdefault(new, event[old])
    return event


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:  # more than once only on a full disk, which the second write then reports
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)


def _number(value: Any) -> float:
    return value if isinstance(value, int | float) else 0


def nan_as_none(value: Any) -> Any:
    """`value` with NaN and infinity, which JSON does not have, replaced by None."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: nan_as_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_as_none(item) for item in value]
    return value
