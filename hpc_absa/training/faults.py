"""Requests to stop, and the detection of ranks that hang.

A signal handler only sets a flag; the flag is acted on once all ranks have agreed. Two threads per
rank end what no flag can end: a rank that was asked to stop and is blocked in a collective, and
ranks of which one does not answer any more.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch

from hpc_absa.comm import Communicator
from hpc_absa.errors import ExitStatus
from hpc_absa.training.calls import Calls
from hpc_absa.training.clock import Clock

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)

GRACE_SECONDS = 5.0
"""A rank that was asked to stop exits by itself after so long without progress. Where progress
comes more rarely by nature (long steps), after three times the longest distance so far."""

HEARTBEAT_INTERVAL = 1.0
"""Seconds between two heartbeats."""

SUSPENDED_SECONDS = 5 * HEARTBEAT_INTERVAL
"""A watchdog thread that did not run for so long was suspended, as all ranks may have been."""

MICROBATCH_WORK = {
    "data": "reading",
    "comp": "computing",
    "adversarial": "computing",
    "rehearsal": "computing",
}
"""Kinds of the clock that are work on one microbatch and wait for no other rank."""

T = TypeVar("T")


class StopRequest:
    """Whether this rank was asked to stop, and whether any rank was.

    When a rank dies, the launcher may ask the others to stop while they wait for it in a
    collective, which no flag can end. So a thread watches: a rank that was asked to stop and makes
    no progress for the grace period exits. What it would have saved is on disk from before.
    """

    def __init__(self, comm: Communicator, file: Path) -> None:
        """Install the signal handlers.

        Args:
            comm: all ranks.
            file: requests a stop by existing; checked by rank 0 alone, because launchers differ in
                the signals they forward.
        """
        self._comm = comm
        self._file = os.fspath(file)
        self._signalled = threading.Event()
        self._last_progress: float | None = None
        self._longest = 0.0
        self._saving = False
        self._closed = threading.Event()
        # A Python handler waits for the main thread, which may be blocked in a collective; what the
        # interpreter writes to the wake-up descriptor reaches the watching thread at once.
        self._wakeup, self._wakeup_writer = socket.socketpair()
        self._wakeup_writer.setblocking(False)
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        self._signals = [  # under nohup, SIGHUP stays ignored
            n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN
        ]
        for number in self._signals:
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, name="stop-watch", daemon=True).start()
        os.register_at_fork(after_in_child=self._after_fork)

    def requested_here(self) -> bool:
        """Whether a stop was requested on this rank; not a collective."""
        self._progress()
        return self._signalled.is_set() or (self._comm.rank == 0 and os.access(self._file, os.F_OK))

    def requested(self) -> bool:
        """Whether a stop was requested on any rank, the same on all ranks (a collective)."""
        flag = torch.tensor([float(self.requested_here())], dtype=torch.float64)
        return bool(self._comm.allreduce_(flag).item())

    def count_progress(self, items: Iterable[T]) -> Iterator[T]:
        """Pass `items` through, each of them progress."""
        for item in items:
            self._progress()
            yield item

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Within, no progress is expected, as while the state is being written to disk."""
        self._saving = True
        try:
            yield
        finally:
            self._progress()
            self._saving = False

    def close(self) -> None:
        """Watch no more, and restore the default handlers: a signal then ends this process."""
        signal.set_wakeup_fd(-1)
        for number in self._signals:
            signal.signal(number, signal.SIG_DFL)
        self._closed.set()
        with suppress(OSError):  # it was closed before
            self._wakeup_writer.shutdown(socket.SHUT_WR)  # also of a forked process
        self._wakeup_writer.close()

    def _progress(self) -> None:
        now = time.monotonic()
        self._longest = max(self._longest, now - (self._last_progress or now))
        self._last_progress = now

    def _after_fork(self) -> None:
        """In a forked process, as of a `multiprocessing.Pool`, whose `terminate` sends SIGTERM.

        The other signals, which may be sent to all processes of a job, do not end it.
        """
        if not self._closed.is_set():
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled.set()

    def _watch(self) -> None:
        with self._wakeup:
            while not set(received := self._wakeup.recv(64)) & set(SIGNALS):
                if not received:  # closed
                    return
            self._signalled.set()
            asked = time.monotonic()
            while not self._closed.wait(0.2):
                waiting = time.monotonic() - max(asked, self._last_progress or 0)
                if waiting > max(GRACE_SECONDS, 3 * self._longest) and not self._saving:
                    print("asked to stop, and blocked in a collective: exiting", flush=True)
                    os._exit(ExitStatus.FAILED)


class Watchdog:
    """Ends all ranks when one of them does not answer, or makes no progress, and names it.

    Every rank sends a heartbeat to the next one each second, in a thread and over MPI. A rank that
    is stopped (SIGSTOP), swapped out, or on a host that died sends none, while the others, which
    wait for it in a collective, continue to send theirs. A rank whose file system hangs or whose
    model loops for ever does send them, but has spent too long on one microbatch. Heartbeats also
    carry which collective call a script is in: other ranks may be in another one.
    """

    def __init__(
        self,
        comm: Communicator,
        hosts: list[str],
        clock: Clock,
        heartbeat_timeout: float,
        progress_timeout: float,
        on_failure: Callable[[str, int, str, ExitStatus], None],
        calls: Calls,
    ) -> None:
        """Start to watch this rank and the previous one.

        Args:
            comm: all ranks.
            hosts: of all ranks.
            clock: shows what this rank is doing.
            heartbeat_timeout: seconds without a heartbeat after which a rank has failed.
            progress_timeout: seconds that reading or computing one microbatch may take.
            on_failure: called with the reason, the failed rank, its host and the exit status;
                ends all ranks.
            calls: of this rank's script.
        """
        self._comm, self._hosts, self._clock, self._calls = comm, hosts, clock, calls
        self._on_failure = on_failure
        self._heartbeat_timeout, self._progress_timeout = heartbeat_timeout, progress_timeout
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching; only where no rank waits for another one any more."""
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        previous = (self._comm.rank - 1) % self._comm.size
        heartbeat = progress = last_run = time.monotonic()
        activity = self._clock.activity()
        while not self._closed.wait(HEARTBEAT_INTERVAL):
            now = time.monotonic()
            suspended, last_run = now - last_run > SUSPENDED_SECONDS, now
            mark = self._comm.exchange_heartbeats(self._calls.mark)
            if mark is not None or suspended:
                heartbeat = now
            if mark and (conflict := self._calls.conflict(previous, mark)):
                self._on_failure(conflict, previous, self._hosts[previous], ExitStatus.USAGE)
                return
            if (current := self._clock.activity()) != activity or suspended:
                activity, progress = current, now
            if now - heartbeat > self._heartbeat_timeout:
                self._fail(previous, f"has not answered for {now - heartbeat:.0f} s")
                return
            kind = activity[0]
            if kind in MICROBATCH_WORK and now - progress > self._progress_timeout:
                what = f"has been {MICROBATCH_WORK[kind]} one microbatch for {now - progress:.0f} s"
                self._fail(self._comm.rank, what)
                return

    def _fail(self, rank: int, why: str) -> None:
        host = self._hosts[rank]
        self._on_failure(f"rank {rank} on {host} {why}", rank, host, ExitStatus.FAILED)
