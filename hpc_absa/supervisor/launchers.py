"""How a world of ranks is started: one command line a launcher."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hpc_absa import worldsize
from hpc_absa.errors import UsageError
from hpc_absa.job import Job

KILL_SECONDS = 3
"""Seconds that Open MPI waits before and after the SIGTERM with which it ends a broken world. Ranks
that are to save and stop are asked by the supervisor instead (`RunDir.stop_request`), in their own
time, so that a dead rank may cost seconds."""


@dataclass(frozen=True)
class Command:
    """What to execute."""

    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    """Set in addition to the present environment."""

    def __str__(self) -> str:
        """As a shell would be given it."""
        changed = {k: v for k, v in self.environment.items() if os.environ.get(k) != v}
        return shlex.join((*(f"{k}={v}" for k, v in changed.items()), *self.words))


def command(job: Job, ranks: int, worker: tuple[str, ...]) -> Command:
    """The command that starts `worker` on every one of `ranks` ranks with the job's launcher.

    Raises:
        UsageError: the launcher is not installed, or its surroundings are missing.
    """
    match job.launch.launcher:
        case "mpirun":
            return _mpirun(job, ranks, worker)
        case "horovodrun":
            return _horovodrun(job, ranks, worker)
        case "srun":
            return _srun(job, ranks, worker)
        case other:
            raise UsageError(f"launch.launcher = {other!r}: expected mpirun, horovodrun or srun")


def mpi_environment() -> dict[str, str]:
    """What MPI needs in every process of ours.

    An MPI installed into the Python environment does not know where it lies unless told; Open MPI
    refuses to serve root, as containers and test machines have it, unless allowed twice.
    """
    environment = {}
    if (Path(sys.prefix) / "bin" / "mpirun").exists():
        environment["OPAL_PREFIX"] = sys.prefix
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return environment


def _mpirun(job: Job, ranks: int, worker: tuple[str, ...]) -> Command:
    words = [_program("mpirun"), "-np", str(ranks), "--bind-to", "none"]
    words += ["--mca", "odls_base_sigkill_timeout", str(KILL_SECONDS)]
    if job.launch.hosts:
        words += ["-H", job.launch.hosts]
    if _crowded(job, ranks):
        words.append("--oversubscribe")
    return Command((*words, *job.launch.extra, *worker), mpi_environment())


def _horovodrun(job: Job, ranks: int, worker: tuple[str, ...]) -> Command:
    words = [
        _program("horovodrun"),
        "-np",
        str(ranks),
        "-H",
        job.launch.hosts or f"localhost:{ranks}",
    ]
    options = f"--bind-to none --mca odls_base_sigkill_timeout {KILL_SECONDS}"
    if _crowded(job, ranks):
        options += " --oversubscribe"
    return Command(
        (*words, f"--mpi-args={options}", *job.launch.extra, *worker),
        # horovodrun looks for mpirun on PATH
        mpi_environment() | {"PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"},
    )


def _srun(job: Job, ranks: int, worker: tuple[str, ...]) -> Command:
    if "SLURM_JOB_ID" not in os.environ:
        raise UsageError("launcher srun: not inside a Slurm allocation; begin one with salloc")
    return Command((_program("srun"), "-n", str(ranks), *job.launch.extra, *worker))


def _crowded(job: Job, ranks: int) -> bool:
    """More ranks than this machine has cores: Open MPI wants to be told that it is meant."""
    return (not job.launch.hosts and ranks > len(os.sched_getaffinity(0))) or (
        bool(job.launch.hosts) and ranks > worldsize.limit(job)
    )


def _program(name: str) -> str:
    """The mpirun that Horovod was built with, a program beside this Python, or one on PATH."""
    if name == "mpirun" and (recorded := _recorded_mpirun()):
        return recorded
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise UsageError(
            f"launcher {name}: not found beside {sys.executable} nor on PATH; "
            "run `make setup`, load your site's MPI module, or choose another --launcher"
        )
    return found


def _recorded_mpirun() -> str | None:
    """What `launch/bootstrap.sh` recorded of the environment, None where it did not make it."""
    try:
        record = json.loads((Path(sys.prefix) / "hpc-absa-env.json").read_text(encoding="utf-8"))
        mpirun = str(record["mpi"]["mpirun"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return mpirun if os.access(mpirun, os.X_OK) else None
