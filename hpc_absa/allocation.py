"""What a batch scheduler gave the job that we are in, read from its environment.

| scheduler | job | hosts | slots of each host |
| --- | --- | --- | --- |
| Slurm | `SLURM_JOB_ID` | `SLURM_JOB_NODELIST`: `n[1-3,7]` | `SLURM_TASKS_PER_NODE`: `4(x3),2` |
| PBS | `PBS_JOBID` | `PBS_NODEFILE`: a file with a line a slot | lines of a host |
| LSF | `LSB_JOBID` | `LSB_DJOB_HOSTFILE`: a file with a line a slot | lines of a host |
| LSF without that file | `LSB_JOBID` | `LSB_MCPU_HOSTS`: `a 4 b 2` | the number after a host |

A slot is a place for one rank. Of all variables of schedulers, these are the ones that sizes come
from; `supervisor/link.py` reads `SLURM_NTASKS` and `SLURM_RESTART_COUNT` besides, of its own jobs.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_absa.errors import UsageError

WORLD_SIZE_VARIABLES = (
    "OMPI_COMM_WORLD_SIZE",  # Open MPI's mpirun
    "PMI_SIZE",  # MPICH, Intel MPI, srun --mpi=pmi2
    "MV2_COMM_WORLD_SIZE",  # MVAPICH
    "HOROVOD_SIZE",  # horovodrun --gloo
)
"""Set by a launcher in every rank it starts; with none of them set a process is alone."""

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
        """Places for ranks, all hosts together."""
        return sum(slots for _, slots in self.hosts)

    def __str__(self) -> str:
        """For people."""
        return f"{self.scheduler} job {self.job_id}: {self.slots} slots on {len(self.hosts)} hosts"


def present(environment: Mapping[str, str] | None = None) -> Allocation | None:
    """The allocation that `environment` (by default this process's) tells of, None without one.

    Raises:
        UsageError: a variable is there, but not what its scheduler would have put there.
    """
    told = os.environ if environment is None else environment
    for scheduler, job, read in (
        ("Slurm", "SLURM_JOB_ID", _slurm),
        ("PBS", "PBS_JOBID", _pbs),
        ("LSF", "LSB_JOBID", _lsf),
    ):
        if job in told and (hosts := read(told)):
            return Allocation(scheduler, told[job], tuple(hosts))
    return None


def counted(names: Iterable[str]) -> Hosts:
    """Hosts with as many slots as their names are there, in order of first appearance."""
    return list(Counter(name for name in names if name).items())


def read_lines(path: str, variable: str) -> list[str]:
    """The lines of a file that a variable or a key names, without comments.

    Raises:
        UsageError: it cannot be read.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{variable} = {path!r}: cannot be read: {error}") from None
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def _slurm(told: Mapping[str, str]) -> Hosts:
    if not (names := list(expand(told.get("SLURM_JOB_NODELIST", "")))):
        return []
    per_node = told.get("SLURM_TASKS_PER_NODE", f"1(x{len(names)})")
    slots: list[int] = []
    for word in per_node.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word)
        if not match:
            raise UsageError(f"SLURM_TASKS_PER_NODE = {per_node!r}: expected a list like 4(x3),2")
        slots += [int(match[1])] * int(match[2] or 1)
    if len(slots) != len(names):
        raise UsageError(
            f"SLURM_TASKS_PER_NODE = {per_node!r} is of {len(slots)} nodes, "
            f"SLURM_JOB_NODELIST of {len(names)}; is this shell still inside its allocation?"
        )
    return list(zip(names, slots, strict=True))


def _pbs(told: Mapping[str, str]) -> Hosts:
    path = told.get("PBS_NODEFILE")
    return counted(read_lines(path, "PBS_NODEFILE")) if path else []


def _lsf(told: Mapping[str, str]) -> Hosts:
    if path := told.get("LSB_DJOB_HOSTFILE"):
        return counted(read_lines(path, "LSB_DJOB_HOSTFILE"))
    words = told.get("LSB_MCPU_HOSTS", "").split()
    if len(words) % 2 or not all(word.isdecimal() for word in words[1::2]):
        raise UsageError(f"LSB_MCPU_HOSTS = {' '.join(words)!r}: expected a list like a 4 b 2")
    return [(name, int(slots)) for name, slots in zip(words[::2], words[1::2], strict=True)]


def expand(nodelist: str) -> Iterator[str]:
    """The nodes of Slurm's short form: `r[1-2]n[01-03],login` is seven nodes."""
    for word in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", nodelist):
        yield from _expand(word)


def _expand(word: str) -> Iterator[str]:
    match = re.match(r"([^\[]*)\[([^\]]*)\](.*)", word)
    if not match:
        yield word
        return
    for part in match[2].split(","):
        first, _, last = part.partition("-")
        for number in range(int(first), int(last or first) + 1):
            for rest in _expand(match[3]):
                yield f"{match[1]}{number:0{len(first)}d}{rest}"
