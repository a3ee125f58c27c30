"""What a finding is, and the checks of this machine, the run directory, the hosts and Slurm."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import resource
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from hpc_absa import allocation, worldsize
from hpc_absa.config import Job
from hpc_absa.errors import HpcAbsaError, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import read_lock
from hpc_absa.supervisor.batch import most_ranks
from hpc_absa.supervisor.launchers import outside_settings
from hpc_absa.supervisor.resources import agent_of, is_here
from hpc_absa.supervisor.slurm import Slurm, SlurmSilentError

OPEN_FILES = 1024
"""Files that a rank or mpirun may have open at the same time, with some hosts."""
SHARED_MEMORY = 64 << 20
"""Bytes needed in /dev/shm: Open MPI takes 4 MiB per rank, and torch's data workers more."""
TMPDIR_LENGTH = 58
"""Longest TMPDIR: a socket's path has at most 108 characters, and Open MPI appends about 50."""
WRITE_TEST = 16 << 20
"""Bytes written to test a file system: the size of a small checkpoint."""
CLOCK_TOLERANCE = 2.0
"""Seconds by which clocks may differ: events of several hosts are ordered by their times."""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    """Name of the check; scripts may look for it."""
    status: Literal["ok", "warning", "error"]
    """`warning`: runs work, but not as well as they could. `error`: they fail."""
    detail: str
    fix: str | None = None
    """How to correct an error or a warning."""

    def to_dict(self) -> dict[str, Any]:
        """The fields, and the same values under their former names `state`, `found` and `cure`."""
        state = {"ok": "good", "warning": "warning", "error": "fault"}[self.status]
        return {**asdict(self), "state": state, "found": self.detail, "cure": self.fix}


def require(check: str, condition: object, detail: str, fix: str) -> Finding:
    """`ok` where the condition holds, otherwise an error with its fix."""
    return Finding(check, "ok", detail) if condition else Finding(check, "error", detail, fix)


def advise(check: str, condition: object, detail: str, fix: str) -> Finding:
    """`ok` where the condition holds, otherwise a warning with its fix."""
    return Finding(check, "ok", detail) if condition else Finding(check, "warning", detail, fix)


def check_machine(job: Job | None) -> Iterator[Finding]:
    """The environment of this shell, the limits of its processes, and the machine's settings."""
    parameters = [setting for setting in outside_settings() if setting.startswith("OMPI_")]
    file = Path(os.path.expanduser("~/.openmpi/mca-params.conf"))  # as it is without a home
    with contextlib.suppress(OSError):
        if file.read_text(errors="replace").strip():
            parameters.append(str(file))
    yield advise(
        "Open MPI's parameters",
        not parameters,
        f"set outside of the job: {', '.join(parameters) or 'none'}",
        "unset them (env -u NAME ...) or move the file away, unless your site requires them",
    )
    settings = [setting for setting in outside_settings() if setting.startswith("HOROVOD_")]
    yield advise(
        "Horovod's settings",
        not settings,
        f"set outside of the job: {', '.join(settings) or 'none'}",
        "unset them (env -u NAME ...), unless you want them for every run",
    )
    variables = [name for name in allocation.WORLD_SIZE_VARIABLES if name in os.environ]
    yield require(
        "launcher's variables",
        not variables,
        f"variables that a launcher sets in its ranks: {', '.join(variables) or 'none'}",
        "open a new shell, or unset them: a process started here would wait for other ranks",
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield require(
        "open files",
        soft >= OPEN_FILES,
        f"a process may open {soft} files (hard limit {hard}); {OPEN_FILES} are needed",
        f"ulimit -n {OPEN_FILES} in your profile, or ask your site to raise the limit",
    )
    folder = tempfile.gettempdir()
    yield require(
        "temporary folder",
        len(folder) <= TMPDIR_LENGTH,
        f"{folder}; MPI's sockets need a path of at most {TMPDIR_LENGTH} characters",
        "export TMPDIR=/tmp, or another short path on a local disk",
    )
    yield _shared_memory()
    yield _host_name()
    yield _cores(job)


def _shared_memory() -> Finding:
    try:
        size = shutil.disk_usage("/dev/shm").total
    except OSError:
        return Finding("shared memory", "ok", "no /dev/shm")
    return require(
        "shared memory",
        size >= SHARED_MEMORY,
        f"/dev/shm has {size >> 20} MiB; {SHARED_MEMORY >> 20} are needed",
        "start the container with --shm-size=1g, or mount -o remount,size=1g /dev/shm",
    )


def _host_name() -> Finding:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        address = ""
    return require(
        "host name",
        address,
        f"{name}, address {address or 'unknown'}",
        f"add the line `127.0.1.1 {name}` to /etc/hosts, or the name to your site's DNS",
    )


def _cores(job: Job | None) -> Finding:
    cores = len(os.sched_getaffinity(0))
    if job is None or job.launch.launcher == "slurm" or worldsize.stated_hosts(job):
        return Finding("cores", "ok", f"{cores} for this process")
    ranks, threads = job.ranks.max or job.ranks.initial, job.train.threads_per_rank or 1
    return advise(
        "cores",
        ranks * threads <= cores,
        f"{cores} for this process; {ranks} ranks of {threads} threads need {ranks * threads}",
        "lower ranks.max or train.threads_per_rank, name more hosts, or ask for more cores "
        "(with fewer, threads share cores, which works but is slow)",
    )


def check_run_dir(run: RunDir) -> Iterator[Finding]:
    """The file system of the run directory or of its nearest existing parent, and its files."""
    folder = next(p for p in (run.path, *run.path.absolute().parents) if p.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".hpc-absa-doctor-") as file:
            yield _space(folder, file.fileno())
            yield _file_locks(folder, file.fileno())
    except OSError as error:
        yield Finding(
            "run directory",
            "error",
            f"{folder}: cannot be written: {os.strerror(error.errno or 0)}",
            "choose another --run-dir, on your project's or scratch file system",
        )
    if run.path.is_dir():
        yield _run_lock(run)
        yield from _checkpoints(run)


def _space(folder: Path, descriptor: int) -> Finding:
    try:
        for _ in range(WRITE_TEST >> 20):
            os.write(descriptor, bytes(1 << 20))
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return Finding(
            "space",
            "error",
            f"{folder}: {os.strerror(error.errno)} after less than {WRITE_TEST >> 20} MiB",
            "remove old runs, lower checkpoint.keep, or choose another --run-dir",
        )
    free = os.statvfs(folder)
    return Finding(
        "run directory", "ok", f"{folder}: {free.f_bavail * free.f_frsize >> 20} MiB free"
    )


def _file_locks(folder: Path, descriptor: int) -> Finding:
    problem = ""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        problem = os.strerror(error.errno or 0)
    return require(
        "file locks",
        not problem,
        f"{folder}: {problem or 'supported'}",
        "mount with locks (Lustre: -o flock; NFS: not nolock), or choose another --run-dir; "
        "without locks two supervisors could use the same run directory",
    )


def _run_lock(run: RunDir) -> Finding:
    lock = read_lock(run.lock)
    if lock is None:
        return Finding("run's lock", "ok", "not held")
    holder = f"held by process {lock.pid} on {lock.host}"
    return advise(
        "run's lock",
        lock.live is not False,
        holder if lock.live is not False else f"{run.lock}: {holder}, which no longer exists",
        "nothing is lost: the same `hpc-absa run` takes the lock over",
    )


def _checkpoints(run: RunDir) -> Iterator[Finding]:
    if not run.checkpoint_files():
        return
    try:
        from hpc_absa.checkpoint import manager
    except ImportError:
        return  # the check of h5py reports it
    results = manager.verify(run.path)
    damaged = [result for result in results if result.error]
    for result in damaged:
        yield Finding(
            "checkpoints",
            "error",
            f"{result.path}: {result.error}",
            "a run uses the one before it; move this file away, and check the disk",
        )
    if not damaged:
        yield Finding("checkpoints", "ok", f"{len(results)} verified")


def check_cluster(job: Job | None) -> Iterator[Finding]:
    """Slurm's client, controller and partition, the allocation, and the job's hosts."""
    yield from _slurm(job)
    try:
        if present := allocation.detect():
            yield Finding("allocation", "ok", str(present))
        else:
            yield Finding("allocation", "ok", "not in a batch job")
    except UsageError as error:
        fix = "log out of the allocation and start it again"
        yield Finding("allocation", "error", str(error), fix)
    if job is not None:
        yield from _hosts(job)


def _slurm(job: Job | None) -> Iterator[Finding]:
    needed = job is not None and job.launch.launcher == "slurm"
    try:
        slurm = Slurm(seconds=20)
    except UsageError as error:
        if needed:
            fix = "log in where sbatch is, or apt-get install slurm-client, or use another launcher"
            yield Finding("slurm client", "error", str(error), fix)
        else:
            yield Finding("slurm client", "ok", "no sbatch on PATH")
        return
    try:
        partition = slurm.partition(
            (job.launch.slurm.partition if job else "") or os.environ.get("SBATCH_PARTITION", "")
        )
    except SlurmSilentError as error:
        if not needed and "configuration source" in str(error):
            yield Finding("slurm controller", "ok", "Slurm's client without a cluster")
        else:
            fix = "wait, or ask your site; SLURM_CONF must name the cluster's slurm.conf"
            yield Finding("slurm controller", "error", str(error), fix)
        return
    except HpcAbsaError as error:
        yield Finding("slurm partition", "error", str(error), "sinfo -s lists the partitions")
        return
    detail = f"{partition.max_nodes} nodes in partition {partition.name}"
    yield Finding("slurm controller", "ok", detail)
    if job is None or not needed:
        return
    most = most_ranks(job, partition)
    yield require(
        "slurm partition",
        most >= job.ranks.initial,
        f"one job in {partition.name} gets {most} ranks; ranks.initial = {job.ranks.initial}",
        "lower ranks.initial, raise launch.ranks_per_node, or choose another partition",
    )
    if setup_script := job.launch.slurm.setup_script:
        yield require(
            "slurm setup script",
            Path(os.path.expanduser(setup_script)).is_file(),
            f"launch.slurm.setup_script = {setup_script!r}",
            "create this file with your site's `module load` lines, or remove the key",
        )


def _hosts(job: Job) -> Iterator[Finding]:
    hosts = worldsize.stated_hosts(job)
    if not hosts:
        yield Finding("hosts", "ok", "the job names none")
        return
    slots = sum(count for _, count in hosts)
    yield require(
        "slots",
        slots >= job.ranks.initial,
        f"{slots} slots on {len(hosts)} hosts; ranks.initial = {job.ranks.initial}",
        "give each host as many slots as it has cores, as in host:4, or name more hosts",
    )
    agent = agent_of(job)
    if not shutil.which(agent[0]):
        fix = "install it (Debian: openssh-client), or set launch.rsh_agent"
        yield Finding("hosts", "error", f"{agent[0]}: not on PATH", fix)
        return
    for host, _ in hosts:
        if not is_here(host):
            yield from _host(host, agent)


def _host(host: str, agent: tuple[str, ...]) -> Iterator[Finding]:
    """Whether the host is reachable, its clock agrees with ours, and it has our Python."""
    before = time.time()
    try:
        done = subprocess.run(
            [*agent, host, f"date +%s.%N; test -x {shlex.quote(sys.executable)} && echo there"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=20,
            check=False,
        )
        lines = done.stdout.splitlines()  # possibly after a banner
        clock = next(line for line in lines if re.fullmatch(r"\d+\.\d+", line.strip()))
        python = "there" in lines
        skew = max(before - float(clock), float(clock) - time.time(), 0.0)
    except (subprocess.TimeoutExpired, StopIteration):
        yield Finding(
            "hosts",
            "error",
            f"{host} does not answer to {' '.join(agent)}",
            f"make `{' '.join(agent)} {host} true` work without a password: ssh-copy-id {host}",
        )
        return
    yield Finding("hosts", "ok", f"{host} answers")
    yield require(
        "clocks",
        skew <= CLOCK_TOLERANCE,
        f"{host}: {skew:.0f} s from this machine's clock",
        "set both clocks with chrony or ntpd: timedatectl set-ntp true",
    )
    yield require(
        "environment on hosts",
        python,
        f"{host}: {sys.executable} {'exists' if python else 'does not exist'}",
        "put the environment on a file system that all hosts share, under the same path",
    )
