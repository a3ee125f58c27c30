"""One supervisor, or one lone world, per run directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time

from hpc_absa.errors import RunLockedError
from hpc_absa.rundir import RunDir

SUPERVISED = "HPC_ABSA_SUPERVISED"
"""Environment variable of ranks whose supervisor holds the run directory's lock for them."""

PATIENCE = 90.0
"""Seconds that the world of a killed supervisor is given to save and end."""


class RunLock:
    """An advisory lock on `D/lock` that the kernel frees when its holder dies."""

    def __init__(self, run: RunDir) -> None:
        """Nothing is held yet."""
        self._path = run.lock
        self._descriptor: int | None = None

    @property
    def descriptor(self) -> int | None:
        """Handed to the launcher, so that the lock lives as long as the world it guards."""
        return self._descriptor

    def acquire(self) -> None:
        """Take the lock and say in the file who holds it.

        Where a dead supervisor's world is still ending, that is waited for up to `PATIENCE`.

        Raises:
            RunLockedError: another process holds it; names host and process id.
        """
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        give_up = time.monotonic() + PATIENCE
        while not _try_lock(descriptor):
            holder = _holder(os.pread(descriptor, 4096, 0))
            if _lives(holder) or time.monotonic() > give_up:
                os.close(descriptor)
                raise RunLockedError(
                    f"{self._path.parent}: in use by process {holder.get('pid', '?')} on "
                    f"{holder.get('host', 'an unknown host')}; stop that one, "
                    "or use another --run-dir"
                )
            time.sleep(0.2)
        os.ftruncate(descriptor, 0)
        text = json.dumps({"host": host(), "pid": os.getpid(), "started": time.time()})
        os.pwrite(descriptor, text.encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Give the lock up, if held."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None


def host() -> str:
    """This machine's name, for locks, events and logs."""
    return socket.gethostname()


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks: the file still tells who came last
    return True


def _lives(holder: dict[str, object]) -> bool:
    """Whether the holder is known to live; a process of another host is taken to."""
    if holder.get("host") != host() or not isinstance(holder.get("pid"), int):
        return bool(holder)
    return os.path.exists(f"/proc/{holder['pid']}")


def _holder(text: bytes) -> dict[str, object]:
    try:
        holder = json.loads(text)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}
