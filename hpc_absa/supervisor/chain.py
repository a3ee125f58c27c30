"""The chain of batch jobs that carries a run from phase to phase, as its files tell.

`D/chain/NNNN.json` says which job is link NNNN. It is made by whoever is first, the submitter after
sbatch or the job itself when it starts, by a hard link, which succeeds once. A submitter holds
`D/chain/lock` and looks the link's name up in the queue before it submits, so that a crash between
sbatch and the record does not submit twice; should two jobs of one link meet all the same, the one
that is not on record leaves at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_absa.rundir import RunDir
from hpc_absa.supervisor.slurm import Slurm, submission

PATIENCE = 1800.0
"""Seconds that a link waits for a slurmctld that does not answer before it gives the chain up;
restarts of a cluster's controller take minutes."""


@dataclass(frozen=True)
class Link:
    """One batch job of the chain."""

    number: int
    """From 1."""
    name: str
    """The job's name in the queue."""
    job_id: str
    nodes: int
    ranks: int
    submitted: float
    """Unix seconds."""


class Chain:
    """The links of one run; every method reads or writes files, none keeps anything in memory."""

    def __init__(self, run: RunDir, job_name: str) -> None:
        """`job_name` is the job's name for people; it is the beginning of its jobs' names."""
        self._run = run
        folder = str(run.path.resolve())
        mark = hashlib.sha256(folder.encode()).hexdigest()[:6]
        self.prefix = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', job_name)}-{mark}-"
        """Names of this chain's jobs begin so, and no other chain's."""

    def name(self, number: int) -> str:
        """The name of link `number` in the queue."""
        return f"{self.prefix}{number}"

    def links(self) -> list[Link]:
        """All links on record, the first one first."""
        return [link for path in sorted(self._run.chain.glob("*.json")) if (link := _read(path))]

    def link(self, number: int) -> Link | None:
        """Link `number`, None if it is not on record."""
        return _read(self._run.link_record(number))

    def last(self) -> Link | None:
        """The newest link on record."""
        return next(iter(reversed(self.links())), None)

    # Submitting

    def submit(self, number: int, text: str, nodes: int, ranks: int, slurm: Slurm) -> Link:
        """Submit link `number` unless it has been; returns it as it is on record.

        Args:
            number: its number.
            text: its batch script.
            nodes: asked for.
            ranks: asked for.
            slurm: the cluster.

        Raises:
            UsageError: Slurm refuses it.
            SlurmSilentError: slurmctld does not answer; asking again is safe.
        """
        self._run.chain.mkdir(exist_ok=True)
        with self._exclusively():
            if found := self.link(number):
                return found
            script = self._run.link_script(number)
            _put(script, text)
            name = self.name(number)
            begun = [job.job_id for job in slurm.jobs(name) if job.name == name and job.alive]
            before = self.link(number - 1)
            words = submission(script.resolve(), before.job_id if before else None)
            job_id = begun[0] if begun else slurm.submit(words)
            return self.record(Link(number, name, job_id, nodes, ranks, time.time()))

    def record(self, link: Link) -> Link:
        """Put a link on record, unless it is already; returns the one that counts."""
        path = self._run.link_record(link.number)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        _put(temporary, json.dumps(asdict(link)))
        try:
            os.link(temporary, path)
        except FileExistsError:
            return _read(path) or link
        finally:
            temporary.unlink()
        self.tell(link, "submitted", nodes=link.nodes, ranks=link.ranks)
        return link

    def tell(self, link: Link, action: str, **more: object) -> None:
        """Write a `link` event."""
        told = {"link": link.number, "job_id": link.job_id, "action": action} | more
        self._run.log.append("link", None, **told)

    # Owning: the incarnation of a link that may work, after a requeue not the one before

    def own(self, job_id: str, restarts: int) -> None:
        """From now on this incarnation of this job carries the chain."""
        _put(self._run.chain / "owner", f"{job_id} {restarts}")

    def owned_by(self, job_id: str, restarts: int) -> bool:
        """Whether no other incarnation has taken over since `own`."""
        try:
            return (self._run.chain / "owner").read_text() == f"{job_id} {restarts}"
        except OSError:
            return False

    # Cancelling

    @property
    def cancelled(self) -> bool:
        """Whether no link may be submitted any more."""
        return (self._run.chain / "cancelled").exists()

    def cancel(self) -> None:
        """Let no link follow the present one."""
        self._run.chain.mkdir(exist_ok=True)
        (self._run.chain / "cancelled").touch()

    def allow(self) -> None:
        """Undo `cancel`: the user wants the run to go on."""
        (self._run.chain / "cancelled").unlink(missing_ok=True)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """One submitter at a time; where the file system has no locks, the names must do."""
        with (self._run.chain / "lock").open("a") as file:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _put(path: Path, text: str) -> None:
    """Write a file whole or not at all, and onto the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read(path: Path) -> Link | None:
    try:
        return Link(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
