"""What a shell and a machine bring along: variables, limits, cores, folders of the system."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hpc_absa import worldsize
from hpc_absa.allocation import WORLD_SIZE_VARIABLES
from hpc_absa.config import Job
from hpc_absa.doctor.finding import Finding, absent, fault, good

OPEN_FILES = 1024
"""Files that a rank and mpirun want to have open at most, with some hosts."""
SHARED_MEMORY = 64 << 20
"""Bytes in /dev/shm: Open MPI's shared memory takes 4 MiB a rank, and torch's workers more."""
SOCKET_PATH = 108
"""Longest name of a socket file, Linux's `sun_path`; Open MPI adds some 50 characters to TMPDIR."""


def check_surroundings(job: Job | None) -> Iterator[Finding]:
    """All of it."""
    yield _mca_leftovers()
    yield _launcher_leftovers()
    yield _open_files()
    yield _temporary_folder()
    yield _shared_memory()
    yield _host_name()
    yield _cores(job)


def _mca_leftovers() -> Finding:
    name = "Open MPI's parameters"
    found = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("OMPI_MCA_")]
    file = Path.home() / ".openmpi" / "mca-params.conf"
    if file.exists() and file.read_text(errors="replace").strip():
        found.append(str(file))
    if found:
        return fault(
            name,
            f"set outside of the job: {', '.join(found)}",
            "unset them (env -u NAME ...), or move the file away, unless your site told you to",
        )
    return good(name, "none set outside of the job")


def _launcher_leftovers() -> Finding:
    name = "launcher's variables"
    found = [variable for variable in WORLD_SIZE_VARIABLES if variable in os.environ]
    if found:
        return fault(
            name,
            f"this shell looks like a rank: {', '.join(found)} in its environment",
            "open a new shell, or unset them: a process started here would wait for other ranks",
        )
    return good(name, "this shell is no rank of anything")


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        return fault(
            "open files",
            f"a process may open {soft} files (hard limit {hard}), expected {OPEN_FILES}",
            f"ulimit -n {OPEN_FILES} in your profile, or ask your site to raise the limit",
        )
    return good("open files", f"a process may open {soft}")


def _temporary_folder() -> Finding:
    folder = tempfile.gettempdir()
    if len(folder) + 50 > SOCKET_PATH:
        return fault(
            "temporary folder",
            f"TMPDIR = {folder} has {len(folder)} characters: too long for MPI's sockets in it",
            "export TMPDIR=/tmp, or another short path on a local disk",
        )
    return good("temporary folder", folder)


def _shared_memory() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return absent("shared memory", "no /dev/shm")
    if size < SHARED_MEMORY:
        return fault(
            "shared memory",
            f"/dev/shm has {size >> 20} MiB, expected {SHARED_MEMORY >> 20}",
            "start the container with --shm-size=1g, or mount -o remount,size=1g /dev/shm",
        )
    return good("shared memory", f"/dev/shm has {size >> 20} MiB")


def _host_name() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return fault(
            "host name",
            f"this machine's name {name!r} has no address",
            f"a line `127.0.1.1 {name}` in /etc/hosts, or the name in your site's DNS",
        )
    return good("host name", f"{name} is {address}")


def _cores(job: Job | None) -> Finding:
    cores = len(os.sched_getaffinity(0))
    if job is None or job.launch.launcher == "slurm" or worldsize.stated_hosts(job):
        return good("cores", f"{cores} for this process")
    ranks = job.ranks.max or job.ranks.initial
    wanted = ranks * (job.train.threads_per_rank or 1)
    if wanted > cores:
        return fault(
            "cores",
            f"{ranks} ranks of {job.train.threads_per_rank or 1} threads want {wanted} cores, "
            f"this process has {cores}",
            "lower ranks.max or train.threads_per_rank, name more hosts, or ask for more cores "
            "(they share cores otherwise, which works and is slow)",
        )
    return good("cores", f"{cores} for at most {ranks} ranks")
