"""The resources of the current batch job, read from the variables of its scheduler.

| scheduler | job | hosts | slots of each host |
| --- | --- | --- | --- |
| Slurm | `SLURM_JOB_ID` | `SLURM_JOB_NODELIST`: `n[1-3,7]` | `SLURM_TASKS_PER_NODE`: `4(x3),2` |
| PBS | `PBS_JOBID` | `PBS_NODEFILE`: a file with a line a slot | lines of a host |
| LSF | `LSB_JOBID` | `LSB_DJOB_HOSTFILE`: a file with a line a slot | lines of a host |
| LSF without that file | `LSB_JOBID` | `LSB_MCPU_HOSTS`: `a 4 b 2` | the number after a host |
| Grid Engine | `JOB_ID` | `PE_HOSTFILE`: a file with a line a host | the number after a host |

A slot holds one rank. In the jobs that we submit, `supervisor/link.py` also reads `SLURM_NTASKS`,
`SLURM_JOB_NUM_NODES` and `SLURM_RESTART_COUNT`.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_absa.errors import UsageError

RANKS = "HPC_ABSA_RANKS"
"""Set by our supervisor: the number of ranks that it asked its launcher for."""

REHEARSED = "HPC_ABSA_REHEARSED"
"""Set by our supervisor for ranks whose job has passed its rehearsal."""

RUN_DIR = "HPC_ABSA_RUN_DIR"
"""Set by `hpc-absa launch` for the script that it supervises: the run directory."""

MAX_RANKS = "HPC_ABSA_MAX_RANKS"
"""Set by `hpc-absa launch` for the script: the largest number of ranks that it may ask for."""

ALLOW_CHANGED = "HPC_ABSA_ALLOW_CHANGED"
"""Set by `hpc-absa launch --allow-changed KEY` for the script: the keys, separated by commas."""

WORLD_SIZE_VARIABLES = (
    "OMPI_COMM_WORLD_SIZE",  # Open MPI's mpirun
    "PMI_SIZE",  # MPICH, Intel MPI, srun --mpi=pmi2
    "MV2_COMM_WORLD_SIZE",  # MVAPICH
    "HOROVOD_SIZE",  # horovodrun --gloo
)
"""Set by launchers in every rank they start; a process without any of them is a single rank."""

Hosts = list[tuple[str, int]]
"""Names with their slots, in the order in which more ranks take more hosts."""


@dataclass(frozen=True)
class Allocation:
    """The hosts of the batch job that this process runs in."""

    scheduler: str
    job_id: str
    hosts: tuple[tuple[str, int], ...]
    """Names with their slots, in the scheduler's order."""

    @property
    def slots(self) -> int:
        """Of all hosts together."""
        return sum(slots for _, slots in self.hosts)

    def __str__(self) -> str:
        return f"{self.scheduler} job {self.job_id}: {self.slots} slots on {len(self.hosts)} hosts"


def detect(environment: Mapping[str, str] | None = None) -> Allocation | None:
    """The allocation described by `environment` (by default this process's), None without one.

    Raises:
        UsageError: a variable has a value that its scheduler would not set.
    """
    variables = os.environ if environment is None else environment
    for scheduler, job, read in (
        ("Slurm", "SLURM_JOB_ID", _slurm),
        ("PBS", "PBS_JOBID", _pbs),
        ("LSF", "LSB_JOBID", _lsf),
        ("Grid Engine", "JOB_ID", _grid_engine),
    ):
        if job in variables and (hosts := read(variables)):
            return Allocation(scheduler, variables[job], tuple(hosts))
    return None


def requested_ranks(environment: Mapping[str, str] | None = None) -> tuple[str, int] | None:
    """How many ranks were asked for, and the variable that states it; None where none does.

    The supervisor knows it best, then the launcher, then Slurm, whose steps also contain the
    daemons of other launchers and shells.
    """
    variables = os.environ if environment is None else environment
    names = [RANKS, *WORLD_SIZE_VARIABLES]
    if "SLURM_STEP_ID" in variables:
        names += ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"]
    for name in names:
        if variables.get(name, "").isdecimal():
            return name, int(variables[name])
    return None


RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID", "HOROVOD_RANK")


def launcher_rank(environment: Mapping[str, str] | None = None) -> int:
    """This process's rank according to its launcher, 0 without one."""
    return _first_number(RANK_VARIABLES, environment)


LOCAL_RANK_VARIABLES = (
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "MPI_LOCALRANKID",  # MPICH, Intel MPI
    "MV2_COMM_WORLD_LOCAL_RANK",
    "HOROVOD_LOCAL_RANK",
    "SLURM_LOCALID",
)


def launcher_local_rank(environment: Mapping[str, str] | None = None) -> int:
    """This process's rank among those of its host according to its launcher, 0 without one."""
    return _first_number(LOCAL_RANK_VARIABLES, environment)


def _first_number(names: Iterable[str], environment: Mapping[str, str] | None) -> int:
    variables = os.environ if environment is None else environment
    values = (variables.get(name, "") for name in names)
    return next((int(value) for value in values if value.isdecimal()), 0)


def counted(names: Iterable[str]) -> Hosts:
    """Hosts with a slot for each appearance of their name, in order of first appearance."""
    return list(Counter(name for name in names if name).items())


def read_lines(path: str, variable: str) -> list[str]:
    """The lines of a file that a variable or a key names, without comments.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        text = Path(os.path.expanduser(path)).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{variable} = {path!r}: cannot be read: {error}") from None
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def _slurm(variables: Mapping[str, str]) -> Hosts:
    if not (names := list(expand(variables.get("SLURM_JOB_NODELIST", "")))):
        return []
    per_node = variables.get("SLURM_TASKS_PER_NODE", f"1(x{len(names)})")
    slots: list[int] = []
    for word in per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word)
        if not match:
            raise UsageError(f"SLURM_TASKS_PER_NODE = {per_node!r}: expected a list like 4(x3),2")
        slots += [int(match[1])] * int(match[2] or 1)
    if len(slots) != len(names):
        raise UsageError(
            f"SLURM_TASKS_PER_NODE = {per_node!r} is for {len(slots)} nodes, SLURM_JOB_NODELIST "
            f"for {len(names)}; log out of the allocation and start it again"
        )
    return list(zip(names, slots, strict=True))


def _pbs(variables: Mapping[str, str]) -> Hosts:
    path = variables.get("PBS_NODEFILE")
    return counted(read_lines(path, "PBS_NODEFILE")) if path else []


def _lsf(variables: Mapping[str, str]) -> Hosts:
    if path := variables.get("LSB_DJOB_HOSTFILE"):
        return counted(read_lines(path, "LSB_DJOB_HOSTFILE"))
    words = variables.get("LSB_MCPU_HOSTS", "").split()
    if len(words) % 2 or not all(word.isdecimal() for word in words[1::2]):
        raise UsageError(f"LSB_MCPU_HOSTS = {' '.join(words)!r}: expected a list like a 4 b 2")
    return [(name, int(slots)) for name, slots in zip(words[::2], words[1::2], strict=True)]


def _grid_engine(variables: Mapping[str, str]) -> Hosts:
    if not (path := variables.get("PE_HOSTFILE")):
        return []
    lines = [line.split() for line in read_lines(path, "PE_HOSTFILE")]
    if not all(len(words) >= 2 and words[1].isdecimal() for words in lines):
        raise UsageError(f"PE_HOSTFILE = {path!r}: expected lines like `a 4 queue range`")
    return [(words[0], int(words[1])) for words in lines]


def expand(nodelist: str) -> Iterator[str]:
    """The nodes of a Slurm node list: `r[1-2]n[01-03],login` is seven nodes."""
    for word in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist):
        match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", word)
        if not match:
            yield word
            continue
        for part in match[2].split(","):
            first, _, last = part.partition("-")
            for number in range(int(first), int(last or first) + 1):
                for rest in list(expand(match[3])) or [""]:
                    yield f"{match[1]}{number:0{len(first)}d}{rest}"
