"""What a supervisor may use: how many ranks, on which hosts."""

from __future__ import annotations

from typing import Protocol

from hpc_absa.job import Job


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


class Fixed:
    """The same number of ranks throughout, on the job's hosts or this machine."""

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


class Allocated:
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
