"""The chain of batch jobs, called links, that carries a run from phase to phase.

`D/chain/NNNN.json` records which job is link NNNN. Whoever is first creates it, the submitter after
sbatch or the job itself when it starts, and only one can. A submitter holds `D/chain/lock` and
looks for the link's name in the queue before it submits, so that a crash between sbatch and the
record does not submit twice. If two jobs of one link start nevertheless, the one that is not on
record exits at once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_absa.errors import HpcAbsaError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event
from hpc_absa.rundir.files import create_once, write_atomic
from hpc_absa.supervisor.slurm import Slurm, submission


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
    """The links of one run; all state is in files."""

    def __init__(self, run: RunDir, job_name: str) -> None:
        self._run = run
        self._owner, self._cancelled = run.chain / "owner", run.chain / "cancelled"
        folder_hash = hashlib.sha256(str(run.path.resolve()).encode()).hexdigest()[:6]
        self.prefix = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', job_name)}-{folder_hash}-"
        """Of the names of this chain's jobs, and of no other chain's."""

    def name(self, number: int) -> str:
        """The name of link `number` in the queue."""
        return f"{self.prefix}{number}"

    def links(self) -> list[Link]:
        """All links on record, the first one first."""
        return recorded_links(self._run)

    def link(self, number: int) -> Link | None:
        """Link `number`, None if it is not on record."""
        return _read(self._run.link_record(number))

    def last(self) -> Link | None:
        """The newest link on record."""
        return next(iter(reversed(self.links())), None)

    def submission(self, number: int) -> tuple[str, ...]:
        """The command that submits link `number`, to start when the one before it has ended."""
        before = self.link(number - 1)
        after = before.job_id if before else None
        return submission(self._run.link_script(number).resolve(), after)

    def submit(self, number: int, script: str, nodes: int, ranks: int, slurm: Slurm) -> Link:
        """Submit link `number` unless it is submitted already; returns it as on record.

        Raises:
            UsageError: Slurm refuses it.
            SubmissionError: it may be submitted, and is not in the queue.
            SlurmSilentError: slurmctld does not answer; it is safe to try again.
        """
        self._run.chain.mkdir(exist_ok=True)
        with (self._run.chain / "lock").open("a") as lock:
            with suppress(OSError):  # a file system without locks: the names must suffice
                fcntl.flock(lock, fcntl.LOCK_EX)
            if link := self.link(number):
                return link
            write_atomic(self._run.link_script(number), script, durable=True)
            name = self.name(number)
            queued = [job.job_id for job in slurm.jobs(name) if job.name == name and job.alive]
            job_id = queued[0] if queued else slurm.submit(self.submission(number), name, script)
            return self.record(Link(number, name, job_id, nodes, ranks, time.time()))

    def record(self, link: Link) -> Link:
        """Put a link on record unless it is already; returns the one on record."""
        path = self._run.link_record(link.number)
        path.parent.mkdir(exist_ok=True)
        if not create_once(path, json.dumps(asdict(link))):
            return _read(path) or link
        self.log(link, "submitted", nodes=link.nodes, ranks=link.ranks)
        return link

    def log(self, link: Link, action: str, **fields: object) -> None:
        """Append a `link` event."""
        self._run.log.append(
            "link", None, link=link.number, job_id=link.job_id, action=action, **fields
        )

    def take_over(self, job_id: str, restarts: int) -> None:
        """From now on this attempt of this job carries the chain, not one before a requeue."""
        write_atomic(self._owner, f"{job_id} {restarts}", durable=True)

    def owned_by(self, job_id: str, restarts: int) -> bool:
        """Whether no later attempt has taken over since `take_over`."""
        try:
            return self._owner.read_text() == f"{job_id} {restarts}"
        except OSError:
            return False

    @property
    def cancelled(self) -> bool:
        """Whether no more links may be submitted."""
        return self._cancelled.exists()

    def cancel(self) -> None:
        """Let no link follow the current one."""
        self._run.chain.mkdir(exist_ok=True)
        self._cancelled.touch()

    def resume(self) -> None:
        """Undo `cancel`."""
        self._cancelled.unlink(missing_ok=True)


def recorded_links(run: RunDir) -> list[Link]:
    """The links on record, the first one first."""
    return [link for path in sorted(run.chain.glob("*.json")) if (link := _read(path))]


def _read(path: Path) -> Link | None:
    try:
        return Link(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def link_events(events: Iterable[Event]) -> Iterator[Event]:
    """The `link` events that have a number and an action."""
    for event in events:
        number, action = event.get("link"), event.get("action")
        if event["event"] == "link" and isinstance(number, int) and isinstance(action, str):
            yield event


@dataclass(frozen=True)
class LinkStatus:
    """One link as `hpc-absa status` shows it."""

    link: int
    job_id: str
    name: str
    """The job's name in the queue."""
    nodes: int
    ranks: int
    state: str
    """Slurm's state (`pending`, `running`, ...) while the job is in the queue, else from the last
    event of the link: `submitted`, `started`, or how it ended."""
    waits_for: str | None
    """Slurm's reason why it is pending."""
    alive: bool | None
    """Whether its job is pending or running; None where Slurm does not answer."""


def chain_status(run: RunDir, events: Sequence[Event]) -> tuple[LinkStatus, ...]:
    """The links of a run's chain, the first one first; empty where there is none."""
    if not (links := recorded_links(run)):
        return ()
    prefix = links[0].name.rpartition("-")[0]
    try:
        queue = {job.job_id: job for job in Slurm(seconds=10).jobs(prefix) if job.alive}
    except HpcAbsaError:
        queue = None
    states = {link.number: "submitted" for link in links}
    for event in link_events(events):
        states[event["link"]] = str(event.get("outcome") or event["action"])
    statuses = []
    for link in links:
        job = (queue or {}).get(link.job_id)
        statuses.append(
            LinkStatus(
                link.number,
                link.job_id,
                link.name,
                link.nodes,
                link.ranks,
                job.state.lower() if job else states[link.number],
                job.reason if job and job.state == "PENDING" else None,
                None if queue is None else job is not None,
            )
        )
    return tuple(statuses)
