"""How a world of ranks is started: one command line a launcher."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hpc_absa import allocation, worldsize
from hpc_absa.config import Job
from hpc_absa.errors import UsageError
from hpc_absa.rundir.lock import SUPERVISED
from hpc_absa.supervisor.hosts import fill, network_environment

KILL_SECONDS = 3
"""Seconds that Open MPI waits before and after the SIGTERM with which it ends a broken world. Ranks
that are to save and stop are asked by the supervisor instead (`RunDir.stop_request`), in their own
time, so that a dead rank may cost seconds."""

KEEPALIVE = {"time": 10, "intvl": 5, "probes": 3}
"""Seconds of silence after which mpirun asks whether a host's daemon lives, seconds between
questions, and questions before it is taken for dead: a host that vanishes costs half a minute.
Open MPI's own are 300, 20 and 9."""

PASSED_ON = ("PYTHONPATH", "OMP_NUM_THREADS", "HDF5_USE_FILE_LOCKING", "TORCH_HOME")
"""Variables of ours that ranks on other hosts get as well; `launch.extra = ["-x", NAME]` adds."""


@dataclass(frozen=True)
class Command:
    """What to execute."""

    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    """Set in addition to the present environment."""

    def __str__(self) -> str:
        """As a shell would be given it."""
        changed = {k: v for k, v in self.environment.items() if os.environ.get(k) != v}
        # A quoted name would be no variable's.
        settings = [f"{name}={shlex.quote(value)}" for name, value in changed.items()]
        return " ".join([*settings, shlex.join(self.words)])


def command(job: Job, ranks: int, worker: tuple[str, ...]) -> Command:
    """The command that starts `worker` on every one of `ranks` ranks with the job's launcher.

    Raises:
        UsageError: the launcher is not installed, or its surroundings are missing.
    """
    match job.launch.launcher:
        case "mpirun":
            found = _mpirun(job, ranks, worker)
        case "horovodrun":
            found = _horovodrun(job, ranks, worker)
        case "srun":
            found = _srun(job, ranks, worker)
        case other:
            raise UsageError(f"launch.launcher = {other!r}: expected mpirun, horovodrun or srun")
    network = network_environment(job.launch.interface)
    return Command(found.words, {**found.environment, **network, SUPERVISED: "1"})


def mpi_environment() -> dict[str, str]:
    """What MPI needs in every process of ours.

    An MPI installed into the Python environment does not know where it lies unless told; Open MPI
    refuses to serve root, as containers and test machines have it, unless allowed twice.
    """
    environment = {}
    if (Path(sys.prefix) / "bin" / "mpirun").exists():
        environment["OPAL_PREFIX"] = os.path.realpath(sys.prefix)
        if "OMPI_MCA_btl" not in os.environ:
            # For one-sided messages over libfabric, of which we send none: a second to close it.
            environment["OMPI_MCA_btl"] = "^ofi"
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return environment


def _mpirun(job: Job, ranks: int, worker: tuple[str, ...]) -> Command:
    words = [program("mpirun"), "-np", str(ranks), *_binding(job)]
    words += ["--mca", "odls_base_sigkill_timeout", str(KILL_SECONDS)]
    if job.launch.hosts:
        words += ["-H", job.launch.hosts, *_remote(job)]
    if _crowded(job, ranks):
        words.append("--oversubscribe")
    return Command((*words, *job.launch.extra, *worker), mpi_environment())


def _binding(job: Job) -> tuple[str, ...]:
    if job.launch.bind == "none":
        return ("--bind-to", "none")
    return ("--map-by", f"slot:PE={job.train.threads_per_rank or 1}", "--bind-to", "core")


def _remote(job: Job) -> list[str]:
    """What mpirun needs where a world has other hosts: ssh passes no environment on."""
    words = []
    for name, value in KEEPALIVE.items():
        words += ["--mca", f"oob_tcp_keepalive_{name}", str(value)]
    if job.launch.rsh_agent:
        words += ["--mca", "plm_rsh_agent", job.launch.rsh_agent]
    network = network_environment(job.launch.interface)
    known = (SUPERVISED, *(name for name in PASSED_ON if name in os.environ), *network)
    for name in known:
        words += ["-x", name]
    return words


def _horovodrun(job: Job, ranks: int, worker: tuple[str, ...]) -> Command:
    words = [
        program("horovodrun"),
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
    given = allocation.present()
    if given is None or given.scheduler != "Slurm":
        raise UsageError("launcher srun: not inside a Slurm allocation; begin one with salloc")
    # Nodes are filled one after the other: a small world leaves the later ones alone.
    nodes = len(fill(list(given.hosts), ranks))
    return Command(
        (program("srun"), "-N", str(nodes), "-n", str(ranks), *job.launch.extra, *worker)
    )


def _crowded(job: Job, ranks: int) -> bool:
    """More ranks than places: Open MPI wants to be told that it is meant."""
    if job.launch.hosts:
        return ranks > sum(slots for _, slots in worldsize.hosts(job.launch.hosts))
    given = allocation.present()
    return ranks > (given.slots if given else len(os.sched_getaffinity(0)))


def program(name: str) -> str:
    """Path of a launcher.

    The mpirun that Horovod was built with, a program beside this Python, or one on PATH.
    """
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
