"""Where a chain of batch jobs stands: its files, and the queue where Slurm can be asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hpc_absa.errors import HpcAbsaError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event
from hpc_absa.supervisor.chain import Chain, Link
from hpc_absa.supervisor.slurm import QueuedJob, Slurm


@dataclass(frozen=True)
class LinkStanding:
    """One link as `hpc-absa status` shows it."""

    link: int
    job_id: str
    name: str
    """The job's name in the queue."""
    nodes: int
    ranks: int
    state: str
    """The queue's word (`pending`, `running`, ...) where Slurm was asked and knows the job, else
    what the link itself told last: `submitted`, `started`, or how it ended."""
    waits_for: str | None
    """Why it waits, in Slurm's word."""
    alive: bool | None
    """Whether its job waits or works; None where Slurm could not be asked."""


def standing(run: RunDir, job_name: str, written: Sequence[Event]) -> tuple[LinkStanding, ...]:
    """The links of a run's chain, the first one first; empty where there is none."""
    chain = Chain(run, job_name)
    links = chain.links()
    queue = _queue(chain) if links else None
    return tuple(_standing(link, queue, written) for link in links)


def _queue(chain: Chain) -> dict[str, QueuedJob] | None:
    try:
        return {job.job_id: job for job in Slurm(seconds=10).jobs(chain.prefix)}
    except HpcAbsaError:
        return None


def _standing(
    link: Link, queue: dict[str, QueuedJob] | None, written: Sequence[Event]
) -> LinkStanding:
    told = [e for e in written if e["event"] == "link" and e.get("link") == link.number]
    word = str(told[-1].get("outcome") or told[-1]["action"]) if told else "submitted"
    job = (queue or {}).get(link.job_id)
    alive = None if queue is None else bool(job and job.alive)
    waits = job.reason if job and job.alive and job.state == "PENDING" else None
    state = job.state.lower() if job and job.alive else word
    return LinkStanding(
        link.number, link.job_id, link.name, link.nodes, link.ranks, state, waits, alive
    )
