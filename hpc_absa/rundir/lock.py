"""One supervisor, or one lone world, per run directory.

The kernel frees the lock when its holder dies. Two cases are beyond it: a file system without
locks, and a holder whose host died while a file server keeps its lock. So a holder also gives signs
of life in the file, and one on another host that gives none any more is taken to be dead.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

from hpc_absa.errors import ExitStatus, RunLockedError
from hpc_absa.rundir import RunDir

SUPERVISED = "HPC_ABSA_SUPERVISED"
"""Environment variable of ranks whose supervisor holds the run directory's lock for them."""

PATIENCE = 90.0
"""Seconds that the world of a killed supervisor is given to save and end."""

BEAT = 5.0
"""Seconds between a holder's signs of life."""

STALE = 30.0
"""Seconds without one after which a holder on another host is taken to be dead."""


class RunLock:
    """An advisory lock on `D/lock`."""

    def __init__(self, run: RunDir, on_lost: Callable[[str], None] | None = None) -> None:
        """Nothing is held yet.

        Args:
            run: whose lock.
            on_lost: called, in a thread, where another process has taken the lock over because
                this one gave no sign of life (suspended for long); by default this process ends.
        """
        self._path = run.lock
        self._on_lost = on_lost or _end
        self._descriptor: int | None = None
        self._released = threading.Event()

    @property
    def descriptor(self) -> int | None:
        """Handed to the launcher, so that the lock lives as long as the world it guards."""
        return self._descriptor

    def acquire(self) -> None:
        """Take the lock and say in the file who holds it.

        Where a dead supervisor's world is still ending, that is waited for up to `PATIENCE`;
        whether a holder on another host lives shows within `STALE`.

        Raises:
            RunLockedError: another process holds it; names host and process id.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        begun, first = time.monotonic(), None
        while (locked := _try_lock(descriptor)) is not True:
            text = os.pread(descriptor, 4096, 0)
            holder = _holder(text)
            first = text if first is None else first
            waited = time.monotonic() - begun
            if locked is None and (not holder or _lives_here(holder) is False):
                break
            if _lives_here(holder) or text != first or waited > PATIENCE:
                os.close(descriptor)
                raise RunLockedError(
                    f"{self._path.parent}: in use by process {holder.get('pid', '?')} on "
                    f"{holder.get('host', 'an unknown host')}; stop that one, "
                    "or use another --run-dir"
                )
            if _lives_here(holder) is None and holder and waited > STALE:
                os.close(descriptor)
                descriptor = self._take_over()
                break
            time.sleep(0.2)
        self._descriptor = descriptor
        self._released.clear()
        started = time.time()
        self._sign(started)
        threading.Thread(target=self._beat, args=(started,), name="lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock up, if held."""
        if self._descriptor is not None:
            self._released.set()
            descriptor, self._descriptor = self._descriptor, None
            os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def _take_over(self) -> int:
        """A lock of our own in the dead holder's place; of several who do so the last one wins."""
        temporary = self._path.with_name(f".lock.{host()}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        _try_lock(descriptor)
        os.replace(temporary, self._path)
        return descriptor

    def _sign(self, started: float) -> None:
        record = {"host": host(), "pid": os.getpid(), "started": started, "beat": time.time()}
        if self._descriptor is not None:
            os.pwrite(self._descriptor, json.dumps(record).ljust(256).encode(), 0)

    def _beat(self, started: float) -> None:
        while not self._released.wait(BEAT):
            try:
                descriptor = self._descriptor
                if descriptor is None:
                    return
                if not os.path.samestat(os.stat(self._path), os.fstat(descriptor)):
                    holder = _holder(self._path.read_bytes())
                    self._on_lost(
                        f"{self._path.parent}: taken over by process {holder.get('pid', '?')} on "
                        f"{holder.get('host', 'an unknown host')}, to which this one seemed dead"
                    )
                    return
                self._sign(started)
            except OSError:
                continue  # a file system that answers late is no reason to end


def host() -> str:
    """This machine's name, for locks, events and logs."""
    return socket.gethostname()


def _try_lock(descriptor: int) -> bool | None:
    """Whether the lock is ours now; None on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _lives_here(holder: dict[str, object]) -> bool | None:
    """Whether the holder lives, where that can be told: on this host."""
    pid, started = holder.get("pid"), holder.get("started")
    if holder.get("host") != host() or not isinstance(pid, int):
        return None
    import psutil

    try:
        created = psutil.Process(pid).create_time()
    except psutil.Error:
        return False
    # A later process may have got the same number.
    return not isinstance(started, int | float) or created <= started + 1


def _holder(text: bytes) -> dict[str, object]:
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _end(reason: str) -> None:
    print(f"hpc-absa: {reason}", file=sys.stderr, flush=True)
    os._exit(ExitStatus.FAILED)
