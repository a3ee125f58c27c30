"""What a supervisor may use: how many ranks, on which hosts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from hpc_absa import allocation, worldsize
from hpc_absa.config import Job
from hpc_absa.supervisor.hosts import HostPool, Tell


class Resources(Protocol):
    """Where worlds find their ranks' places."""

    def here(self) -> int:
        """Ranks that the next world can have."""
        ...

    def most(self) -> int:
        """Ranks that a decision may ask for; what a batch would feed beyond them is accumulated."""
        ...

    def placed(self, job: Job, ranks: int) -> Job:
        """The job with the launcher and hosts of a world of `ranks` ranks."""
        ...

    def failed(self, host: str | None) -> None:
        """The last world failed, on this host as far as anybody knows."""
        ...

    def succeeded(self) -> None:
        """The last world ended in order."""
        ...

    def watching(self, returned: Callable[[], None]) -> AbstractContextManager[None]:
        """While a world runs; calls `returned`, in a thread, when there is more than before."""
        ...


class Steady:
    """Nothing comes and nothing goes."""

    def failed(self, host: str | None) -> None:
        """No choice of hosts."""

    def succeeded(self) -> None:
        """Nothing to learn."""

    def watching(self, returned: Callable[[], None]) -> AbstractContextManager[None]:
        """Nothing to wait for."""
        return nullcontext()


class Fixed(Steady):
    """The same number of ranks throughout, on this machine or where the launcher puts them."""

    def __init__(self, limit: int) -> None:
        """At most `limit` ranks."""
        self._limit = limit

    def here(self) -> int:
        """The limit."""
        return self._limit

    def most(self) -> int:
        """The limit."""
        return self._limit

    def placed(self, job: Job, ranks: int) -> Job:
        """The job as it is."""
        return job


class Allocated(Steady):
    """The tasks of the batch job that we are in, while the next one may have more."""

    def __init__(self, tasks: int, most: int) -> None:
        """`tasks` of this job, and `most` that any job of the chain can have."""
        self._tasks, self._most = tasks, max(tasks, most)

    def here(self) -> int:
        """The present job's tasks."""
        return self._tasks

    def most(self) -> int:
        """What the partition gives one job."""
        return self._most

    def placed(self, job: Job, ranks: int) -> Job:
        """Started by the program that the job names for within a batch job."""
        launch = job.launch.model_copy(update={"launcher": job.launch.slurm.step, "hosts": ""})
        return job.model_copy(update={"launch": launch})


def resources_of(job: Job, tell: Tell) -> Resources:
    """The hosts that the job names, those of the scheduler's allocation, or this machine.

    Args:
        job: the job.
        tell: hears what becomes of hosts.
    """
    named = worldsize.stated_hosts(job)
    given = None if named else allocation.present()
    if given and (given.scheduler != "Slurm" or job.launch.launcher == "horovodrun"):
        named = list(given.hosts)  # within Slurm, mpirun and srun know their hosts themselves
    if named:
        return HostPool(job, named, tell)
    limit = worldsize.limit(job)
    return Fixed(min(limit, given.slots) if given else limit)
