"""One link of a chain: what a batch job does from its start to handing over to the next."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from hpc_absa import config, worldsize
from hpc_absa.config import Job
from hpc_absa.errors import ExitStatus, HpcAbsaError, RunLockedError, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import RunLock
from hpc_absa.supervisor import driver
from hpc_absa.supervisor.batch import Size, most_ranks, script, size_of
from hpc_absa.supervisor.chain import PATIENCE, Chain, Link
from hpc_absa.supervisor.resources import Allocated
from hpc_absa.supervisor.slurm import Partition, Slurm, SlurmSilentError, patiently

FENCE = 600.0
"""Seconds that a requeued job waits for the processes of its former life on a node that slurmctld
has lost; they are asked to save and end."""

REMEMBERED = 86400.0
"""Seconds for which a size that Slurm refused is not asked for again; limits change."""

IDLE_LINKS = 3
"""Jobs in a row that reach their time limit without a step before a chain is given up."""


@dataclass(frozen=True)
class BatchJob:
    """The batch job that this process runs in."""

    job_id: str
    restarts: int
    """How often Slurm has requeued it."""
    tasks: int
    nodes: int

    @classmethod
    def here(cls) -> BatchJob:
        """From Slurm's environment.

        Raises:
            UsageError: this is no batch job.
        """
        told = os.environ
        if "SLURM_JOB_ID" not in told:
            raise UsageError("hpc-absa link: not in a batch job; `hpc-absa run` submits it")
        return cls(
            told["SLURM_JOB_ID"],
            int(told.get("SLURM_RESTART_COUNT", "0")),
            int(told.get("SLURM_NTASKS", "1")),
            int(told.get("SLURM_JOB_NUM_NODES", "1")),
        )


class LinkRun:
    """The present batch job as a link of the chain."""

    def __init__(
        self,
        run: RunDir,
        number: int,
        allow_changed: tuple[str, ...],
        show: Callable[[str], None],
        slurm: Slurm | None = None,
    ) -> None:
        """Read the job; nothing is claimed yet."""
        self._run, self._number, self._allow, self._show = run, number, allow_changed, show
        self._job: Job = config.load(run.job, warn=False)
        self._me = BatchJob.here()
        self._slurm = slurm or Slurm()
        self._chain = Chain(run, self._job.name)
        self._link = Link(
            number,
            self._chain.name(number),
            self._me.job_id,
            self._me.nodes,
            self._me.tasks,
            time.time(),
        )

    def work(self) -> ExitStatus:
        """Run this link's phase, then submit the next link if there is more to do."""
        if why := self._nothing_to_do():
            self._show(f"link {self._number} (job {self._me.job_id}): {why}; leaving")
            return ExitStatus.OK
        self._chain.own(self._me.job_id, self._me.restarts)
        self._chain.tell(self._link, "started", ranks=self._me.tasks, restarts=self._me.restarts)
        self._fence()
        partition = self._partition()
        if self._me.restarts and self._grown(partition) > self._me.tasks:
            return self._next("resize", partition)  # requeued between its decision and its end
        self._say_limit(partition)
        supervisor = driver.Supervisor(
            self._job,
            self._run,
            self._allow,
            self._show,
            Allocated(self._me.tasks, self._most(partition)),
        )
        if self._chain.cancelled:
            return self._end("cancelled")
        try:
            status = supervisor.supervise()
        except HpcAbsaError as error:
            self._end("failed", reason=str(error))
            raise
        return self._hand_over(status, supervisor.stopped_by)

    def _nothing_to_do(self) -> str | None:
        recorded = self._chain.record(self._link)
        if recorded.job_id != self._me.job_id:
            return f"job {recorded.job_id} is this link"
        if self._chain.link(self._number + 1):
            return "the next link has been submitted"
        if driver.finished(self._run):
            return "the run is done"
        return "the chain was cancelled" if self._chain.cancelled else None

    def _fence(self) -> None:
        """Have the processes of our former life end before we begin."""
        until = time.monotonic() + FENCE
        while True:
            lock = RunLock(self._run)
            try:
                lock.acquire()
            except RunLockedError as error:
                if time.monotonic() > until:
                    raise
                self._show(f"waiting for a former life of this run to save and end: {error}")
                self._run.stop_request.touch()
                time.sleep(2)
                continue
            lock.release()
            return

    # Handing over

    def _hand_over(self, status: ExitStatus, stopped_by: int | None) -> ExitStatus:
        """Go on in another job, leave the going-on to Slurm, or end the chain."""
        if not self._chain.owned_by(self._me.job_id, self._me.restarts):
            self._show("another life of this job has taken over")
            return ExitStatus.STOPPED
        if driver.finished(self._run):
            return self._end("done")
        if status == ExitStatus.FAILED:
            self._end("failed", reason="too many failures without progress")
            return status
        if self._chain.cancelled:
            return self._end("cancelled")
        if stopped_by in (signal.SIGTERM, signal.SIGINT) and not self._preempted():
            return self._end("terminated", reason="Slurm or a user ends the job")
        ended = [e for e in self._run.log.read() if e["event"] == "phase_end"][-1:]
        outcome = str(ended[0]["outcome"]) if ended else "stopped"
        if outcome != "resize" and stopped_by is None:
            return self._end("stopped", reason="asked to by a file")
        return self._next(outcome if outcome == "resize" else "time", self._partition())

    def _next(self, why: str, partition: Partition) -> ExitStatus:
        """Submit the next link; falls back to the present size where Slurm refuses a larger one."""
        if why == "time" and self._idle():
            self._end("failed", reason="no step within the time limit of several jobs")
            return ExitStatus.FAILED
        sizes = [size_of(self._job, self._grown(partition), partition)]
        if sizes[0].ranks > self._me.tasks:
            sizes.append(size_of(self._job, self._me.tasks, partition))
        for size in sizes:
            try:
                link = self._submit(size)
            except UsageError as error:
                if size is sizes[-1]:
                    self._end("failed", reason=str(error))
                    raise
                self._show(f"Slurm refuses {size} ({error}); accumulating on what there is")
                self._chain.tell(self._link, "refused", ranks=size.ranks, reason=str(error))
                continue
            self._show(f"link {link.number}: job {link.job_id}, {size}")
            return self._end(why, next_job=link.job_id)
        raise AssertionError("a size was submitted or refused for good")

    def _submit(self, size: Size) -> Link:
        number = self._number + 1
        name = self._chain.name(number)
        text = script(self._job, self._run, number, name, size, self._allow)
        return patiently(
            lambda: self._chain.submit(number, text, size.nodes, size.ranks, self._slurm), PATIENCE
        )

    def _end(self, outcome: str, **more: object) -> ExitStatus:
        self._chain.tell(self._link, "ended", outcome=outcome, step=self._step(), **more)
        going_on = outcome in ("done", "resize", "time")
        return ExitStatus.OK if going_on else ExitStatus.STOPPED

    # What there is

    def _partition(self) -> Partition:
        name = os.environ.get("SLURM_JOB_PARTITION") or self._job.launch.slurm.partition
        return patiently(lambda: self._slurm.partition(name), PATIENCE)

    def _grown(self, partition: Partition) -> int:
        """Ranks that the present global batch feeds, at most what a job can have."""
        batch = driver.present_batch(self._job, self._run)
        return worldsize.ranks_for(self._job, batch, self._most(partition))

    def _most(self, partition: Partition) -> int:
        """Ranks that the partition gives one job, fewer than Slurm refused within a day."""
        refused = [
            int(event["ranks"]) - 1
            for event in self._run.log.read()
            if event.get("action") == "refused" and event["time"] > time.time() - REMEMBERED
        ]
        return max(1, min([most_ranks(self._job, partition), *refused]))

    def _say_limit(self, partition: Partition) -> None:
        most = self._most(partition)
        feeds = self._job.ranks.max or self._job.schedule.largest_batch
        largest = worldsize.ranks_for(self._job, self._job.schedule.largest_batch, feeds)
        if largest > most:
            self._show(
                f"partition {partition.name} gives one job at most {partition.max_nodes} nodes "
                f"now: what would feed more than {most} ranks is accumulated"
            )

    def _preempted(self) -> bool:
        """Whether a SIGTERM was the beginning of a preemption's grace time."""
        try:
            return self._slurm.preempted(self._me.job_id)
        except (SlurmSilentError, UsageError):
            return False

    def _idle(self) -> bool:
        """Whether the links before and this one came no step further, each to its time limit."""
        ended = [
            event["step"]
            for event in self._run.log.read()
            if event["event"] == "link" and event["action"] == "ended"
        ]
        return len(ended) >= IDLE_LINKS and set(ended[-IDLE_LINKS:]) == {self._step()}

    def _step(self) -> int:
        """Steps of the newest checkpoint, by its name."""
        return self._run.newest_step() or 0
