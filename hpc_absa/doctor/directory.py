"""The run directory and its file system."""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hpc_absa.doctor.finding import Finding, fault, good
from hpc_absa.rundir import RunDir
from hpc_absa.status import read_lock

SAMPLE = 16 << 20
"""Bytes written to try a file system: a small checkpoint's."""


def check_directory(run: RunDir) -> Iterator[Finding]:
    """Where a run writes, tried on the folder itself or the nearest one above that exists."""
    folder = next(p for p in (run.path, *run.path.absolute().parents) if p.exists())
    yield from _file_system(folder)
    if run.path.is_dir():
        yield _lock(run)
        yield from _checkpoints(run)


def _file_system(folder: Path) -> Iterator[Finding]:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".hpc-absa-doctor-") as file:
            yield _space(folder, file.fileno())
            yield _locks(folder, file.fileno())
    except OSError as error:
        yield fault(
            "run directory",
            f"{folder}: cannot be written: {os.strerror(error.errno or 0)}",
            "choose another --run-dir, on your project's or scratch file system",
        )


def _space(folder: Path, descriptor: int) -> Finding:
    try:
        for _ in range(SAMPLE >> 20):
            os.write(descriptor, bytes(1 << 20))
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return fault(
            "space",
            f"{folder}: {os.strerror(error.errno)} after less than {SAMPLE >> 20} MiB",
            "remove old runs, lower checkpoint.keep, or choose another --run-dir",
        )
    free = os.statvfs(folder)
    return good("run directory", f"{folder}: {free.f_bavail * free.f_frsize >> 20} MiB free")


def _locks(folder: Path, descriptor: int) -> Finding:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return fault(
            "file locks",
            f"{folder}: no file locks here: {os.strerror(error.errno or 0)}",
            "mount with locks (Lustre: -o flock; NFS: not nolock), or choose another --run-dir; "
            "without them nothing keeps two supervisors apart",
        )
    return good("file locks", f"{folder} has them")


def _lock(run: RunDir) -> Finding:
    lock = read_lock(run.lock)
    if lock is None:
        return good("run's lock", "nobody works on it")
    holder = f"process {lock.pid} on {lock.host}"
    if lock.live is False:
        return fault(
            "run's lock",
            f"{run.lock} names {holder}, which is gone: killed, or its machine went down",
            "nothing is lost: give the same `hpc-absa run` again; it takes the lock over",
        )
    return good("run's lock", f"{holder} works on it")


def _checkpoints(run: RunDir) -> Iterator[Finding]:
    if not any(run.checkpoints.glob("*.h5")):
        return
    try:
        from hpc_absa.checkpoint import verification
    except ImportError:
        return  # a broken h5py is a finding of its own, and must not end the examination
    results = verification.verify(run.path)
    damaged = [result for result in results if result.error]
    for result in damaged:
        yield fault(
            "checkpoints",
            f"{result.path}: {result.error}",
            "a run passes it over for the one before; move it away, and check that disk",
        )
    if not damaged:
        yield good("checkpoints", f"{len(results)} are good")
