"""The lock of a run directory: one supervisor, or one set of ranks started by hand, at a time.

The kernel releases the lock when its holder exits. Two cases need more: a file system without
locks, and a holder whose host crashed while a file server keeps its lock. The holder therefore also
writes heartbeats into the file, and a holder on another host without heartbeats counts as dead.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc_absa.errors import ExitStatus, RunDirError, RunLockedError
from hpc_absa.rundir import RunDir

SUPERVISED = "HPC_ABSA_SUPERVISED"
"""Environment variable of ranks whose supervisor holds the run directory's lock for them."""

EXIT_TIMEOUT = 90.0
"""Seconds to wait for the ranks of a killed supervisor to save and exit."""

HEARTBEAT_INTERVAL = 5.0
HEARTBEAT_TIMEOUT = 30.0
"""Seconds without a heartbeat after which a holder on another host counts as dead."""

CLOCK_TOLERANCE = 5.0
"""Seconds by which a process may seem younger than its lock (the boot time is rounded)."""


@dataclass(frozen=True)
class LockHolder:
    """The process named in a lock file."""

    host: str
    pid: int
    started: float
    """Unix seconds at which it took the lock; NaN if the file does not have it."""
    live: bool | None
    """Whether the process is alive; None on another host, where it cannot be checked."""


def read_lock(path: Path) -> LockHolder | None:
    """The holder named in a lock file; None without a readable one.

    The lock itself is not tried: even that could make a starting run fail.
    """
    try:
        return _parse(path.read_bytes())
    except OSError:
        return None


def process_is_alive(pid: int, started: float) -> bool:
    """Whether the process `pid` of this host is the one that ran at `started`, and still runs.

    A zombie holds no lock any more and is dead; a later process with the same number is another.

    Args:
        pid: process id.
        started: Unix seconds at which the process already ran; NaN if unknown.
    """
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return False
        return not process.create_time() > started + CLOCK_TOLERANCE
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError):
        return False


class RunLock:
    """An advisory lock on `D/lock`, or on another file of a run directory."""

    def __init__(
        self,
        run: RunDir,
        on_lost: Callable[[str], None] | None = None,
        path: Path | None = None,
    ) -> None:
        """The lock of `run`, not acquired.

        Args:
            run: the run directory.
            path: the lock's file, by default `run.lock`.
            on_lost: called in a thread when another process has taken the lock over because this
                one wrote no heartbeats (it was suspended for long); by default the process exits.
        """
        self._run, self._path = run.path, path or run.lock
        self._on_lost = on_lost or _exit
        self._descriptor: int | None = None
        self._released = threading.Event()

    @property
    def descriptor(self) -> int | None:
        """For the launcher to inherit, so that the lock is held as long as the ranks run."""
        return self._descriptor

    def acquire(self, wait: bool = False) -> None:
        """Take the lock and write this process into the file.

        Waits up to `EXIT_TIMEOUT` for the ranks of a dead supervisor to exit, with `wait` also for
        a holder that is alive, and up to `HEARTBEAT_TIMEOUT` for a heartbeat of a holder on
        another host.

        Raises:
            RunLockedError: another process holds it; names host and process id.
            RunDirError: the file cannot be written; names path and cause.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        begin = changed = time.monotonic()
        first = os.pread(descriptor, 4096, 0)
        while (locked := _try_lock(descriptor)) is not True:
            text = os.pread(descriptor, 4096, 0)
            holder = _parse(text)
            live = holder.live if holder else None
            now = time.monotonic()
            if wait and text != first:  # a heartbeat
                first, changed = text, now
            if locked is None and (holder is None or live is False):
                break
            if (live and not wait) or text != first or now - begin > EXIT_TIMEOUT:
                os.close(descriptor)
                raise RunLockedError(
                    f"{self._run}: in use by {_name(holder)}; stop that one, "
                    "or use another --run-dir"
                )
            if holder and live is None and now - changed > HEARTBEAT_TIMEOUT:
                os.close(descriptor)
                descriptor = self._take_over()
                break
            time.sleep(0.2)
        self._descriptor = descriptor
        self._released.clear()
        started = time.time()
        try:
            self._write(started)
        except OSError as error:  # a full disk
            self.release()
            reason = error.strerror or error
            raise RunDirError(f"{self._path}: cannot be written: {reason}") from None
        threading.Thread(
            target=self._write_heartbeats, args=(started,), name="lock", daemon=True
        ).start()

    def release(self) -> None:
        """Release the lock, if held."""
        if self._descriptor is not None:
            self._released.set()
            descriptor, self._descriptor = self._descriptor, None
            os.ftruncate(descriptor, 0)
            os.close(descriptor)

    def _take_over(self) -> int:
        """A new lock file in place of the dead holder's; of several processes the last one wins."""
        temporary = self._path.with_name(f".{self._path.name}.{host()}.{os.getpid()}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        _try_lock(descriptor)
        os.replace(temporary, self._path)
        return descriptor

    def _write(self, started: float) -> None:
        record = {"host": host(), "pid": os.getpid(), "started": started, "beat": time.time()}
        if self._descriptor is not None:
            os.pwrite(self._descriptor, json.dumps(record).ljust(256).encode(), 0)

    def _write_heartbeats(self, started: float) -> None:
        while not self._released.wait(HEARTBEAT_INTERVAL):
            try:
                descriptor = self._descriptor
                if descriptor is None:
                    return
                if not os.path.samestat(os.stat(self._path), os.fstat(descriptor)):
                    self._on_lost(
                        f"{self._run}: taken over by {_name(read_lock(self._path))}, "
                        "which received no heartbeats from this one"
                    )
                    return
                self._write(started)
            except OSError:
                continue  # a slow file system is not a lost lock


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


def _parse(text: bytes) -> LockHolder | None:
    try:
        record = json.loads(text)
        pid = record["pid"]
    except (ValueError, TypeError, KeyError):
        return None
    if not isinstance(pid, int):
        return None
    started, where = _seconds(record.get("started")), str(record.get("host", ""))
    # At the last heartbeat: the clock may have been set since the process started.
    seen = _seconds(record.get("beat", started))
    live = process_is_alive(pid, seen) if where == host() else None
    return LockHolder(where, pid, started, live)


def _seconds(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _name(holder: LockHolder | None) -> str:
    if holder is None:
        return "process ? on an unknown host"
    return f"process {holder.pid} on {holder.host or 'an unknown host'}"


def _exit(reason: str) -> None:
    print(f"hpc-absa: {reason}", file=sys.stderr, flush=True)
    os._exit(ExitStatus.FAILED)
