"""Slurm's commands: the only module that runs them and parses their output."""

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
"""Final states of a job. In all others it is pending or running."""

NODE = re.compile(r"(\S+)\s+(\d+)\+?")
"""A line of `sinfo -o "%T %c"`."""

UNUSABLE = ("down", "drain", "drng", "fail", "maint", "unk", "inval", "future", "perfctrs", "power")
"""Beginnings of the states in which sinfo shows nodes that no job can have now."""

SILENT = re.compile(
    r"Unable to contact|Socket timed out|Zero Bytes|Connection refused|standby mode|"
    r"Communication connection failure|configuration source|slurm_load|timed out|try again",
    re.IGNORECASE,
)
"""Error messages that mean that slurmctld does not answer, rather than that it refuses."""

INHERITED = re.compile(
    r"SLURM_(?!(CONF|CONF_SERVER|JWT|CLUSTERS|EXIT_ERROR|TIME_FORMAT|UMASK)$)"
    r"|(PMI|PMIX|PRTE|OPAL|ORTE|HPC_ABSA)_"
    r"|OMPI_(?!MCA_)|OMPI_MCA_(orte|ess|pmix|initial|shmem_RUNTIME)"
    r"|SBATCH_(WAIT|ARRAY_INX)$"
)
"""Variables of the current job, its steps and its ranks, which the next job must not inherit. What
a user or a site has set for all jobs is passed on: `SLURM_CONF`, `SBATCH_ACCOUNT`, `OMPI_MCA_*`."""

DIRECTIVE = re.compile(r"^#SBATCH\s+--?([A-Za-z-]+)", re.MULTILINE)
VARIABLE_OF = {
    **{"time": "TIMELIMIT", "t": "TIMELIMIT", "mem": "MEM_PER_NODE", "A": "ACCOUNT"},
    **{"p": "PARTITION", "q": "QOS", "C": "CONSTRAINT", "requeue": "NO_REQUEUE"},
}
"""`SBATCH_...` variables that are not named like their options."""

JOB_ID = re.compile(r"(?:Submitted batch job )?(\d+)(?:;\S+)?")
"""The line with which sbatch answers; sites print others before and after it."""


class SubmissionError(HpcAbsaError):
    """It is not known whether a job was submitted: another one must not be."""


class SlurmSilentError(HpcAbsaError):
    """slurmctld does not answer now; a later attempt may succeed."""


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it."""

    job_id: str
    name: str
    state: str
    """As Slurm writes it: `PENDING`, `RUNNING`, `COMPLETED`, ..."""
    reason: str
    """Why it is pending."""

    @property
    def alive(self) -> bool:
        """Whether it is pending or running."""
        return self.state not in ENDED


@dataclass(frozen=True)
class Partition:
    """What a partition can give to one job."""

    name: str
    max_nodes: int
    """Usable nodes, at most the partition's `MaxNodes`."""
    cpus: int
    """CPUs of its smallest node."""


class Slurm:
    """Runs the commands."""

    def __init__(self, seconds: float = 120.0) -> None:
        """Check that the commands are installed.

        Args:
            seconds: a command that takes longer counts as not answered.

        Raises:
            UsageError: Slurm's client commands are not installed here.
        """
        self._seconds = seconds
        if not shutil.which("sbatch"):
            raise UsageError(
                "launcher slurm: sbatch is not on PATH; run this on a login node of the cluster, "
                "or choose another --launcher"
            )

    def submit(self, words: tuple[str, ...], name: str, script: str) -> str:
        """Submit a batch script with the words of `submission`; returns the job's id.

        Args:
            words: sbatch and its arguments.
            name: of the job, to look for it where sbatch does not print its id.
            script: the text; its options count more than the `SBATCH_...` of this environment.

        Raises:
            UsageError: Slurm refuses the job; has Slurm's message.
            SubmissionError: sbatch ended without an error, and the job is not in the queue.
            SlurmSilentError: slurmctld does not answer; the job may or may not be submitted.
        """
        options = DIRECTIVE.findall(script)
        stated = {f"SBATCH_{VARIABLE_OF.get(o, o.upper().replace('-', '_'))}" for o in options}
        environment = {
            key: value
            for key, value in os.environ.items()
            if not INHERITED.match(key) and key not in stated
        }
        output = self._run(words, environment)
        answers = (JOB_ID.fullmatch(line.strip()) for line in output.splitlines())
        ids = {answer[1] for answer in answers if answer}
        if len(ids) != 1:
            ids = {job.job_id for job in self.jobs(name) if job.name == name and job.alive}
        if len(ids) != 1:
            raise SubmissionError(
                f"sbatch: expected one line with a job id, got {output[:200]!r}; look for a job "
                f"{name} with squeue --me"
            )
        return ids.pop()

    def jobs(self, prefix: str) -> list[QueuedJob]:
        """This user's jobs whose name begins with `prefix`, including those that just ended."""
        words = ("squeue", "-h", "-a", "-t", "all", "-u", str(os.geteuid()), "-o", "%A|%j|%T|%r")
        rows = [line.split("|") for line in self._run(words).splitlines() if line.count("|") >= 3]
        return [
            QueuedJob(*row[:4]) for row in rows if row[0].isdecimal() and row[1].startswith(prefix)
        ]

    def cancel(self, job_id: str) -> None:
        """End a job, or remove it from the queue; a job that has ended is not an error."""
        try:
            self._run(("scancel", job_id))
        except UsageError as error:
            if "Invalid job id" not in str(error):
                raise

    def preempted(self, job_id: str) -> bool:
        """Whether a job is running in the grace time of a preemption.

        A job that ends within it has ended for Slurm, which requeues only what it had to kill.
        """
        job = _fields(self._run(("scontrol", "show", "job", "-o", job_id)))
        preempted = job.get("PreemptTime", "None") not in ("None", "")
        return preempted and job.get("JobState") == "RUNNING"

    def partition(self, name: str) -> Partition:
        """What partition `name`, or the default one where it is empty, can give to one job.

        Raises:
            UsageError: there is no such partition.
        """
        known = [
            _fields(line)
            for line in self._run(("scontrol", "show", "partition", "-o")).splitlines()
        ]
        key, value = ("PartitionName", name.split(",")[0]) if name else ("Default", "YES")
        fields = next((p for p in known if p.get(key) == value), None)
        if fields is None:
            names = ", ".join(p["PartitionName"] for p in known if "PartitionName" in p)
            what = f"launch.slurm.partition = {name!r}" if name else "no default partition"
            raise UsageError(f"{what}: expected one of {names}")
        name, most = fields["PartitionName"], fields.get("MaxNodes", "")
        lines = self._run(("sinfo", "-h", "-N", "-p", name, "-o", "%T %c")).splitlines()
        matches = [match for line in lines if (match := NODE.fullmatch(line.strip()))]
        nodes = [(match[1], int(match[2])) for match in matches]
        usable = [cpus for state, cpus in nodes if not state.startswith(UNUSABLE)]
        return Partition(
            name,
            min(len(usable), int(most) if most.isdecimal() and int(most) else len(usable)),
            min(usable or [cpus for _, cpus in nodes], default=1),
        )

    def _run(self, words: tuple[str, ...], environment: Mapping[str, str] | None = None) -> str:
        try:
            done = subprocess.run(
                words,
                env=environment,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=self._seconds,
            )
        except subprocess.TimeoutExpired:
            raise SlurmSilentError(f"{words[0]}: no answer within {self._seconds} s") from None
        except OSError as error:
            raise UsageError(f"{words[0]}: {error.strerror}; are Slurm's commands here?") from None
        if done.returncode == 0:
            return done.stdout.strip()
        message = " ".join((done.stderr or done.stdout).split())
        if SILENT.search(message):
            raise SlurmSilentError(f"{words[0]}: {message}")
        raise UsageError(f"{words[0]}: {message.removeprefix(f'{words[0]}: ')}")


def submission(script: Path, after: str | None) -> tuple[str, ...]:
    """The command that submits a batch script, to start when job `after` has ended."""
    dependency = (f"--dependency=afterany:{after}",) if after else ()
    return ("sbatch", "--parsable", *dependency, str(script))


def retry_while_silent(call: Callable[[], T], seconds: float, pause: float = 5.0) -> T:
    """`call()`, repeated while slurmctld does not answer, for up to `seconds`."""
    until = time.monotonic() + seconds
    while True:
        try:
            return call()
        except SlurmSilentError:
            if time.monotonic() > until:
                raise
            time.sleep(pause)


def _fields(line: str) -> dict[str, str]:
    """`Key=value` words as `scontrol -o` prints them."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)
