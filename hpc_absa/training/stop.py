"""A request to stop: a flag set by signals or by a file, acted on only when all ranks agree."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import torch

from hpc_absa.comm import Communicator
from hpc_absa.errors import ExitStatus

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

GRACE = 5.0
"""Seconds without a sign of life after which a rank that was told to stop ends by itself. Where
signs of life are further apart by nature (long steps), three times their longest distance."""

T = TypeVar("T")


class StopRequest:
    """Whether this rank has been asked to stop, and whether any rank has.

    When a rank dies, the launcher may tell the others to stop while they wait for the dead one in
    a collective, which no flag can end. So a thread watches: a rank that has been told to stop and
    then shows no sign of life for the grace period exits, in case the launcher does not kill it.
    What it would have saved is on disk from before.
    """

    def __init__(self, comm: Communicator, file: Path) -> None:
        """`file` is looked for by rank 0 alone: launchers differ in the signals they pass on."""
        self._comm = comm
        self._file = file
        self._signalled = threading.Event()
        self._last_beat: float | None = None
        self._longest = 0.0
        self._busy = False
        # A handler in Python waits for the main thread, which may be stuck in a collective; what
        # the interpreter writes to the wake-up descriptor reaches the watching thread at once.
        self._wakeup, told = socket.socketpair()
        told.setblocking(False)
        self._told = told
        signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._watch, name="stop-watch", daemon=True).start()

    def here(self) -> bool:
        """Whether this rank knows of a request; no collective."""
        self._beat()
        return self._signalled.is_set() or (self._comm.rank == 0 and self._file.exists())

    def agreed(self) -> bool:
        """Whether any rank knows of a request: the same answer on every rank (a collective)."""
        flag = torch.tensor([float(self.here())], dtype=torch.float64)
        return bool(self._comm.allreduce_(flag).item())

    def alive(self, items: Iterable[T]) -> Iterator[T]:
        """Pass `items` through, each a sign of life."""
        for item in items:
            self._beat()
            yield item

    @contextmanager
    def busy(self) -> Iterator[None]:
        """No sign of life is expected within: the state is on its way to the disk."""
        self._busy = True
        try:
            yield
        finally:
            self._beat()
            self._busy = False

    def close(self) -> None:
        """Listen no more: from here on a signal does what it does to any program."""
        signal.set_wakeup_fd(-1)
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)

    def _beat(self) -> None:
        now = time.monotonic()
        self._longest = max(self._longest, now - (self._last_beat or now))
        self._last_beat = now

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled.set()

    def _watch(self) -> None:
        while not set(self._wakeup.recv(64)) & set(SIGNALS):
            pass
        self._signalled.set()
        told = time.monotonic()
        while True:
            time.sleep(0.2)
            silent = time.monotonic() - max(told, self._last_beat or 0)
            if silent > max(GRACE, 3 * self._longest) and not self._busy:
                print("told to stop, and stuck in a collective: ending", flush=True)
                os._exit(ExitStatus.FAILED)
