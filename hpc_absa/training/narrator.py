"""What a run tells: events for programs, lines for people. Only rank 0's narrator speaks."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Any, TextIO

from hpc_absa.checkpoint.store import Published
from hpc_absa.records import Decision, Eigenvalue, ScheduleState
from hpc_absa.rundir import RunDir

EVIDENCE = ("residual", "converged", "stopped_above_threshold", "seconds")
"""Fields of an eigenvalue that an event has under the same name."""

LINE_EVERY = 10.0
"""Seconds between progress lines where epochs are longer than that."""


class Narrator:
    """Appends events and prints lines; on other ranks than 0 it does nothing."""

    def __init__(self, run: RunDir, rank: int, output: TextIO) -> None:
        """`output` is where people look; a rank's log gets the same through its own stdout."""
        self._run = run
        self._speaks = rank == 0
        self._output = output
        self._pending: list[tuple[str, int, dict[str, Any]]] = []
        self._queued = self._written = 0  # events that have ever been pending, and no longer are
        self._last_line = time.monotonic()
        self._phase = 1

    def say(self, line: str) -> None:
        """Print a line for people, to the launcher and into the rank's own log."""
        if not self._speaks:
            return
        self._last_line = time.monotonic()
        for output in (self._output, sys.stdout):
            with contextlib.suppress(OSError):  # no room for a log is no reason to end
                print(line, file=output, flush=True)

    def progress(self, line: str) -> None:
        """Print `line` if nothing has been said for a while."""
        if time.monotonic() - self._last_line >= LINE_EVERY:
            self.say(line)

    def emit(self, event: str, phase: int, **fields: Any) -> None:
        """Append an event now."""
        self._phase = phase
        if self._speaks:
            self._run.log.append(event, phase, **fields)

    def emit_when_saved(self, event: str, phase: int, **fields: Any) -> None:
        """Append an event once the next checkpoint is durable: what is logged is never redone."""
        if self._speaks:
            self._pending.append((event, phase, {"time": time.time(), **fields}))
            self._queued += 1

    def save_failed(self, reason: str) -> None:
        """A checkpoint could not be written and training goes on: an event and a line."""
        self.say(f"warning: {reason}")
        if self._speaks:
            # Where the disk is full, the log may be as well.
            with contextlib.suppress(OSError):
                self.emit("save_failed", self._phase, reason=reason)

    def decision(
        self,
        phase: int,
        epoch: float,
        before: ScheduleState,
        eigenvalue: Eigenvalue | None,
        decision: Decision,
        *,
        step: int,
        samples: int,
        ranks: int,
        next_ranks: int,
        **more: float,
    ) -> None:
        """A decision as an event, once it is saved, and as a sentence where there is news."""
        moved = f", ranks {ranks} → {next_ranks}" if next_ranks != ranks else ""
        reason = decision.reason + moved
        evidence: dict[str, Any] = dict.fromkeys(EVIDENCE)
        if eigenvalue:
            evidence = {name: getattr(eigenvalue, name) for name in EVIDENCE}
        self.emit_when_saved(
            "decision",
            phase,
            epoch=epoch,
            step=step,
            samples=samples,
            eigenvalue=eigenvalue.value if eigenvalue else None,
            **evidence,
            settled=evidence["stopped_above_threshold"],
            matvecs=eigenvalue.matvecs if eigenvalue else 0,
            hessian_samples=eigenvalue.samples if eigenvalue else 0,
            reference=before.reference,
            action=decision.action,
            reason=reason,
            batch=before.global_batch,
            next_batch=decision.state.global_batch,
            ranks=ranks,
            next_ranks=next_ranks,
            lr=before.lr,
            next_lr=decision.state.lr,
            **more,
        )
        if eigenvalue or more or decision.action == "grow":
            self.say(f"decision at epoch {epoch:g} · {reason}")

    def on_saved(self, phase: int, step: int, samples: int) -> Any:
        """What the saver calls when the checkpoint that closes the pending events is durable.

        Where that one fails they wait for the next.
        """
        upto = self._queued

        def saved(published: Published) -> None:
            while self._written < upto:
                event, of_phase, fields = self._pending[0]
                self.emit(event, of_phase, **fields)
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


def duration(seconds: float) -> str:
    """`h:mm:ss`, or `m:ss` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
