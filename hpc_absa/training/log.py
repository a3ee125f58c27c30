"""Events for programs and lines for the console, written by rank 0."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import psutil
import torch

from hpc_absa.checkpoint import Published
from hpc_absa.errors import RunDirError
from hpc_absa.rundir import RunDir

LINE_INTERVAL = 10.0
"""Seconds between progress lines, where epochs take longer than that."""
PROGRESS_SECONDS = (1.0, 10.0)
"""Shortest and longest time between `progress` events, where steps do not take longer."""
PROGRESS_SHARE = 1e-3
"""Between these limits, the part of the time since the phase began: the log stays small."""


class EventLogger:
    """Appends events and prints lines on rank 0; does nothing on other ranks."""

    def __init__(self, run: RunDir, rank: int, console: TextIO) -> None:
        """`console` is the launcher's output; standard output gets the same lines."""
        self._run, self._active, self._console = run, rank == 0, console
        self._pending: list[tuple[str, int, dict[str, Any]]] = []
        self._queued = self._written = 0  # events ever put into `_pending`, and taken out of it
        self._last_line = time.monotonic()
        self._phase = 1

    def print(self, line: str) -> None:
        """Print a line to the console and to the rank's log file."""
        if not self._active:
            return
        self._last_line = time.monotonic()
        print(line, file=self._console, flush=True)  # does not raise: `console.never_fail`
        if self._console is not sys.stdout:
            print(line, flush=True)

    def line_due(self) -> bool:
        """Whether nothing was printed for `LINE_INTERVAL`."""
        return self._active and time.monotonic() - self._last_line >= LINE_INTERVAL

    def emit(self, event: str, phase: int, **fields: Any) -> None:
        """Append an event now."""
        self._phase = phase
        if self._active:
            self._run.log.append(event, phase, **fields)

    def emit_when_saved(self, event: str, phase: int, **fields: Any) -> None:
        """Append an event once the next checkpoint is on disk: what is logged is never redone."""
        if self._active:
            self._pending.append((event, phase, {"time": time.time(), **fields}))
            self._queued += 1

    def save_failed(self, reason: str) -> None:
        """A checkpoint could not be written, and training continues."""
        self.print(f"warning: {reason}")
        with contextlib.suppress(RunDirError):  # where the disk is full, the log may be as well
            self.emit("save_failed", self._phase, reason=reason)

    def on_saved(self, phase: int, step: int, samples: int) -> Callable[[Published], None]:
        """What to call when the next checkpoint is on disk: writes the pending events.

        If that save fails, they wait for the next one.
        """
        until = self._queued

        def saved(published: Published) -> None:
            while self._written < until:
                event, event_phase, fields = self._pending[0]
                self.emit(event, event_phase, **fields)
                del self._pending[0]
                self._written += 1
            self.emit(
                "checkpoint",
                phase,
                path=published.path.name,
                bytes=published.bytes,
                seconds=published.seconds,
                step=step,
                samples=samples,
            )

        return saved


class ProgressMeter:
    """Loss and speed of the steps since the last `progress` event."""

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._restart()

    def _restart(self) -> None:
        self._last = self._step_begun = time.monotonic()
        self._loss = self._denominator = self._seconds = 0.0
        self._samples = 0

    def begin_step(self) -> None:
        self._step_begun = time.monotonic()

    def end_step(self, loss: float, denominator: float, samples: int) -> None:
        """Args: the step's sum of losses, what it is divided by for their mean, its samples."""
        self._loss += loss
        self._denominator += denominator
        self._samples += samples
        self._seconds += time.monotonic() - self._step_begun

    def due(self) -> bool:
        """Whether it is time for the next event."""
        now = time.monotonic()
        shortest, longest = PROGRESS_SECONDS
        interval = max(shortest, min(longest, (now - self._begun) * PROGRESS_SHARE))
        return now - self._last >= interval

    def take(self) -> dict[str, float]:
        """The fields of the event; the next one begins here."""
        fields = {
            "train_loss": self._loss / (self._denominator or 1.0),
            "samples_per_second": self._samples / max(self._seconds, 1e-9),
        }
        self._restart()
        return fields


def memory_in_use(device: torch.device) -> int:
    """Bytes: on a GPU the largest allocation so far, otherwise what the process has resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def duration(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
