"""The command line that starts the ranks of a phase, for each launcher."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

from hpc_absa import allocation, worldsize
from hpc_absa.config import Launchable
from hpc_absa.errors import UsageError
from hpc_absa.rundir.lock import SUPERVISED
from hpc_absa.supervisor.resources import fill

KILL_SECONDS = 3
"""Seconds that Open MPI waits before and after the SIGTERM with which it ends the other ranks after
one has failed, or it was ended itself. It can be short: ranks that are to save and stop are asked
by the supervisor (`RunDir.stop_request`) and take as long as they need. The supervisor does not
wait for it where the ranks are on its own host (`process.py`)."""

KEEPALIVE = {"time": 10, "intvl": 5, "probes": 3}
"""TCP keepalive between mpirun and its daemons: idle seconds before the first probe, seconds
between probes, and unanswered probes until the connection is closed. The loss of a host is noticed
within half a minute; Open MPI's defaults are 300, 20 and 9."""

PASSED_ON = ("PYTHONPATH", "OMP_NUM_THREADS", "HDF5_USE_FILE_LOCKING", "TORCH_HOME")
"""Variables that ranks on other hosts get as well; `launch.extra = ["-x", NAME]` adds others."""


Names = tuple[str, ...]
"""Variables that every rank gets; horovodrun and srun pass on the whole environment."""

BUILD_SETTING = re.compile(
    r"HOROVOD_(WITH|WITHOUT|GPU|CPU|NCCL|CUDA|ROCM|MPI|MPICXX|BUILD|CMAKE|ALLOW|JOBS)(_|$)"
)
"""Variables that only the compilation of Horovod reads."""


@dataclass(frozen=True)
class Command:
    """What to execute."""

    words: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)
    """Set in addition to the current environment."""
    directory: str | None = None
    """Folder in which it is executed; None for the current one."""

    def __str__(self) -> str:
        """As input of a shell."""
        changed = {k: v for k, v in self.environment.items() if os.environ.get(k) != v}
        # Only the value is quoted: a quoted name would not be an assignment.
        settings = [f"{name}={shlex.quote(value)}" for name, value in changed.items()]
        line = " ".join([*settings, shlex.join(self.words)])
        elsewhere = self.directory is not None and self.directory != os.getcwd()
        return f"cd {shlex.quote(str(self.directory))} && {line}" if elsewhere else line


def command(job: Launchable, ranks: int, worker: Command) -> Command:
    """The command that starts `worker` as `ranks` ranks with the job's launcher.

    Raises:
        UsageError: the launcher is not installed, or cannot be used here.
    """
    build = {"mpirun": _mpirun, "horovodrun": _horovodrun, "srun": _srun}.get(job.launch.launcher)
    if build is None:
        raise UsageError(
            f"launch.launcher = {job.launch.launcher!r}: expected mpirun, horovodrun or srun"
        )
    ours = {SUPERVISED: "1", allocation.RANKS: str(ranks), **worker.environment}
    words, environment = build(job, ranks, tuple(ours))
    environment |= network_environment(job.launch.interface) | ours
    return Command((*words, *job.launch.extra, *worker.words), environment, worker.directory)


def mpi_environment() -> dict[str, str]:
    """What MPI needs in the environment of every process.

    An MPI installed into the Python environment must be given its location. Open MPI refuses to
    run as root, which containers and test machines need, unless it is allowed by two variables.
    """
    environment = {}
    if (Path(sys.prefix) / "bin" / "mpirun").exists():
        environment["OPAL_PREFIX"] = os.path.realpath(sys.prefix)
        if "OMPI_MCA_btl" not in os.environ:
            # One-sided messages over libfabric are not used, and closing it takes a second.
            environment["OMPI_MCA_btl"] = "^ofi"
    if os.geteuid() == 0:
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return environment


def outside_settings() -> list[str]:
    """Settings of Open MPI and Horovod in this environment, which reach the ranks, by name."""
    names = sorted(n for n in os.environ if n.startswith(("OMPI_MCA_", "HOROVOD_")))
    return [f"{name}={os.environ[name]}" for name in names if not BUILD_SETTING.match(name)]


def network_environment(interface: str) -> dict[str, str]:
    """What makes MPI, Horovod's Gloo and NCCL use one network interface."""
    names = (
        "OMPI_MCA_btl_tcp_if_include",
        "OMPI_MCA_oob_tcp_if_include",
        "NCCL_SOCKET_IFNAME",
        "HOROVOD_GLOO_IFACE",
        "GLOO_SOCKET_IFNAME",
    )
    return dict.fromkeys(names, interface) if interface else {}


def _mpirun(job: Launchable, ranks: int, names: Names) -> tuple[list[str], dict[str, str]]:
    words = [program("mpirun"), "-np", str(ranks), *_binding(job)]
    words += ["--mca", "odls_base_sigkill_timeout", str(KILL_SECONDS)]
    if job.launch.hosts:
        words += ["-H", job.launch.hosts, *_remote_options(job, names)]
    if _oversubscribed(job, ranks):
        words.append("--oversubscribe")
    return words, mpi_environment()


def _binding(job: Launchable) -> tuple[str, ...]:
    if job.launch.bind == "none":
        return ("--bind-to", "none")
    return ("--map-by", f"slot:PE={job.train.threads_per_rank or 1}", "--bind-to", "core")


def _remote_options(job: Launchable, names: Names) -> list[str]:
    """What mpirun needs for other hosts: ssh passes no environment on."""
    words = []
    for name, value in KEEPALIVE.items():
        words += ["--mca", f"oob_tcp_keepalive_{name}", str(value)]
    if job.launch.rsh_agent:
        words += ["--mca", "plm_rsh_agent", job.launch.rsh_agent]
    passed_on = [name for name in PASSED_ON if name in os.environ and name not in names]
    for name in (*names, *passed_on, *network_environment(job.launch.interface)):
        words += ["-x", name]
    return words


def _horovodrun(job: Launchable, ranks: int, names: Names) -> tuple[list[str], dict[str, str]]:
    hosts = job.launch.hosts or f"localhost:{ranks}"
    options = f"--bind-to none --mca odls_base_sigkill_timeout {KILL_SECONDS}"
    if _oversubscribed(job, ranks):
        options += " --oversubscribe"
    words = [program("horovodrun"), "-np", str(ranks), "-H", hosts, f"--mpi-args={options}"]
    # horovodrun looks for mpirun on PATH
    path = f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}"
    return words, mpi_environment() | {"PATH": path}


def _srun(job: Launchable, ranks: int, names: Names) -> tuple[list[str], dict[str, str]]:
    current = allocation.detect()
    if current is None or current.scheduler != "Slurm":
        raise UsageError("launcher srun: not inside a Slurm allocation; begin one with salloc")
    nodes = len(fill(list(current.hosts), ranks))  # few ranks do not use the last nodes
    return [program("srun"), "-N", str(nodes), "-n", str(ranks)], {}


def _oversubscribed(job: Launchable, ranks: int) -> bool:
    """More ranks than slots, which Open MPI allows only on request."""
    if job.launch.hosts:
        return ranks > sum(slots for _, slots in worldsize.hosts(job.launch.hosts))
    current = allocation.detect()
    return ranks > (current.slots if current else cores())


def cores(cpus: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores of this process, which are Open MPI's slots: the hardware threads of one count once."""
    siblings = set[str]()
    for number in os.sched_getaffinity(0):
        try:
            siblings.add((cpus / f"cpu{number}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(number))
    return len(siblings)


def program(name: str) -> str:
    """Path of a launcher: Horovod's own mpirun, a program beside this Python, or one on PATH."""
    if name == "mpirun":
        record = Path(sys.prefix) / "hpc-absa-env.json"  # written by launch/bootstrap.sh
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            mpirun = str(json.loads(record.read_text(encoding="utf-8"))["mpi"]["mpirun"])
            if os.access(mpirun, os.X_OK):
                return mpirun
    beside = Path(sys.executable).parent / name
    path = str(beside) if beside.exists() else shutil.which(name)
    if not path:
        raise UsageError(
            f"launcher {name}: not found beside {sys.executable} nor on PATH; "
            "run `make setup`, load your site's MPI module, or choose another --launcher"
        )
    return path
