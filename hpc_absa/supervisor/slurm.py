"""Slurm's commands: the one place that runs them and reads what they print."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hpc_absa.errors import HpcAbsaError, UsageError

T = TypeVar("T")

ENDED = {
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT"),
}
"""States of a job that will do nothing more. All others are of one that waits or works."""

UNUSABLE = ("down", "drain", "drng", "fail", "maint", "unk", "inval", "future", "perfctrs", "power")
"""Beginnings of the states in which sinfo shows nodes that no job can have for now."""

SILENT = re.compile(
    r"Unable to contact|Socket timed out|Zero Bytes|Connection refused|standby mode|"
    r"Communication connection failure|configuration source|slurm_load|timed out|try again",
    re.IGNORECASE,
)
"""What the commands say when slurmctld does not answer, rather than saying no."""

INHERITED = re.compile(r"(SLURM|SBATCH|PMI|PMIX|OMPI|PRTE|OPAL|ORTE|HPC_ABSA)_")
"""Variables of the present job's own ranks and steps, which the next job must not inherit."""


class SlurmSilentError(HpcAbsaError):
    """slurmctld does not answer for now; asking again later may help."""


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it."""

    job_id: str
    name: str
    state: str
    """As Slurm writes it: `PENDING`, `RUNNING`, `COMPLETED`, ..."""
    reason: str
    """Why it waits."""
    nodes: int

    @property
    def alive(self) -> bool:
        """Whether it waits or works."""
        return self.state not in ENDED


@dataclass(frozen=True)
class Partition:
    """What a partition can give to one job."""

    name: str
    max_nodes: int
    """Nodes that one job may have and that are in order now."""
    limit: int | None
    """`MaxNodes` of the partition; None without one."""
    cpus: int
    """CPUs of its smallest node."""


class Slurm:
    """Runs the commands."""

    def __init__(self, seconds: float = 120.0) -> None:
        """Nothing is asked yet.

        Args:
            seconds: the longest that a command may take; slurmctld is silent then.

        Raises:
            UsageError: Slurm's client commands are not installed here.
        """
        self._seconds = seconds
        if not shutil.which("sbatch"):
            raise UsageError(
                "launcher slurm: sbatch is not on PATH; run this on a login node of the cluster, "
                "or choose another --launcher"
            )

    def submit(self, words: tuple[str, ...]) -> str:
        """Submit a batch script with `submission`'s words; returns the job's id.

        Raises:
            UsageError: Slurm refuses the job; its own words say why.
            SlurmSilentError: slurmctld does not answer; the job may or may not be there.
        """
        environment = {k: v for k, v in os.environ.items() if not INHERITED.match(k)}
        environment |= {k: v for k, v in os.environ.items() if k == "SLURM_CONF"}
        return self._say(words, environment).split(";")[0]

    def jobs(self, prefix: str) -> list[QueuedJob]:
        """This user's jobs whose name begins with `prefix`, also those that ended just now."""
        lines = self._say(
            ("squeue", "-h", "-a", "-t", "all", "-u", str(os.geteuid()), "-o", "%A|%j|%T|%r|%D")
        )
        found = [line.split("|") for line in lines.splitlines() if line.count("|") >= 4]
        return [
            QueuedJob(job_id, name, state, reason, int(nodes) if nodes.isdecimal() else 0)
            for job_id, name, state, reason, nodes, *_ in found
            if name.startswith(prefix)
        ]

    def cancel(self, job_id: str) -> None:
        """End a job, or take it from the queue; one that is gone is no error."""
        try:
            self._say(("scancel", job_id))
        except UsageError as error:
            if "Invalid job id" not in str(error):
                raise

    def preempted(self, job_id: str) -> bool:
        """Whether a job lives on in the grace time of a preemption.

        Ending within it, it is over for Slurm, which puts it back into the queue only when it had
        to kill it.
        """
        told = _fields(self._say(("scontrol", "show", "job", "-o", job_id)))
        preempted = told.get("PreemptTime", "None") not in ("None", "")
        return preempted and told.get("JobState") == "RUNNING"

    def partition(self, name: str) -> Partition:
        """What partition `name`, or the default one where it is empty, can give to one job.

        Raises:
            UsageError: there is no such partition.
        """
        known = [_fields(line) for line in self._partitions().splitlines()]
        wanted = name.split(",")[0]
        found = [p for p in known if p.get("PartitionName") == wanted]
        if not wanted:
            found = [p for p in known if p.get("Default") == "YES"]
        if not found:
            names = ", ".join(p["PartitionName"] for p in known if "PartitionName" in p)
            what = f"launch.slurm.partition = {name!r}" if name else "no default partition"
            raise UsageError(f"{what}: expected one of {names}")
        told = found[0]
        nodes = self._nodes(told["PartitionName"])
        usable = [cpus for state, cpus in nodes if not state.startswith(UNUSABLE)]
        limit = int(told["MaxNodes"]) if told.get("MaxNodes", "").isdecimal() else None
        return Partition(
            told["PartitionName"],
            min(len(usable), limit or len(usable)),
            limit,
            min(usable or [cpus for _, cpus in nodes], default=1),
        )

    def _partitions(self) -> str:
        return self._say(("scontrol", "show", "partition", "-o"))

    def _nodes(self, partition: str) -> list[tuple[str, int]]:
        """State and CPUs of each node."""
        lines = self._say(("sinfo", "-h", "-N", "-p", partition, "-o", "%T %c")).splitlines()
        pairs = (line.split() for line in lines)
        return [(state, int(cpus.rstrip("+"))) for state, cpus in pairs]

    def _say(self, words: tuple[str, ...], environment: Mapping[str, str] | None = None) -> str:
        try:
            done = subprocess.run(
                words,
                env=environment,
                capture_output=True,
                text=True,
                timeout=self._seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise SlurmSilentError(f"{words[0]}: no answer within {self._seconds} s") from None
        except OSError as error:
            raise UsageError(f"{words[0]}: {error.strerror}; are Slurm's commands here?") from None
        if done.returncode == 0:
            return done.stdout.strip()
        said = " ".join((done.stderr or done.stdout).split())
        if SILENT.search(said):
            raise SlurmSilentError(f"{words[0]}: {said}")
        raise UsageError(f"{words[0]}: {said.removeprefix(f'{words[0]}: ')}")


def submission(script: Path, after: str | None) -> tuple[str, ...]:
    """The words that submit a batch script, to begin when job `after` has ended."""
    dependency = (f"--dependency=afterany:{after}",) if after else ()
    return ("sbatch", "--parsable", *dependency, str(script))


def patiently(ask: Callable[[], T], seconds: float, pause: float = 5.0) -> T:
    """`ask()`, again and again while slurmctld does not answer, for up to `seconds`."""
    until = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except SlurmSilentError:
            if time.monotonic() > until:
                raise
            time.sleep(pause)


def _fields(line: str) -> dict[str, str]:
    """`Key=value` words as `scontrol -o` prints them."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)
