"""What the batch job of one link does, from its start to the submission of the next link."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

from hpc_absa import worldsize
from hpc_absa.errors import ExitStatus, HpcAbsaError, RunLockedError, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import RunLock
from hpc_absa.supervisor.batch import Size, most_ranks, script, size_of
from hpc_absa.supervisor.chain import Chain, Link, link_events
from hpc_absa.supervisor.program import read_program
from hpc_absa.supervisor.resources import BatchJobTasks
from hpc_absa.supervisor.run_state import finished, next_ranks
from hpc_absa.supervisor.slurm import (
    Partition,
    Slurm,
    SlurmSilentError,
    SubmissionError,
    retry_while_silent,
)
from hpc_absa.supervisor.supervisor import Supervisor

SLURM_SECONDS = 1800.0
"""A link waits so long for a slurmctld that does not answer; restarting one takes minutes."""

PREVIOUS_ATTEMPT_SECONDS = 600.0
"""A requeued job waits so long for the processes of its previous attempt, which may still run on a
node that slurmctld has lost; they are asked to save and exit."""

REFUSAL_SECONDS = 86400.0
"""A size that Slurm refused is not requested again for so long; limits change."""

MOST_IDLE_LINKS = 3
"""A chain ends after so many jobs in a row that reach their time limit without a step."""


class LinkRun:
    """The current batch job, as Slurm's variables describe it, as a link of the chain."""

    def __init__(
        self,
        run: RunDir,
        number: int,
        allow_changed: tuple[str, ...],
        show: Callable[[str], None],
    ) -> None:
        self._run, self._show = run, show
        self._program = read_program(run, allow_changed)
        self._settings = self._program.settings
        self._chain, self._slurm = Chain(run, self._settings.name), Slurm()
        variables = os.environ
        if "SLURM_JOB_ID" not in variables:
            raise UsageError("hpc-absa link: not in a batch job; `hpc-absa run` submits it")
        self._restarts = int(variables.get("SLURM_RESTART_COUNT", "0"))
        self._link = Link(
            number,
            self._chain.name(number),
            variables["SLURM_JOB_ID"],
            int(variables.get("SLURM_JOB_NUM_NODES", "1")),
            int(variables.get("SLURM_NTASKS", "1")),
            time.time(),
        )

    def work(self) -> ExitStatus:
        """Run this link's phase, then submit the next link if the run is not done."""
        if reason := self._reason_to_exit():
            self._show(f"link {self._link.number} (job {self._link.job_id}): {reason}; exiting")
            return ExitStatus.OK
        self._chain.take_over(self._link.job_id, self._restarts)
        self._chain.log(self._link, "started", ranks=self._link.ranks, restarts=self._restarts)
        self._wait_for_previous_attempt()
        partition = self._partition()
        if self._restarts and self._next_ranks(partition) > self._link.ranks:
            # requeued after the decision, before the end of the job
            return self._submit_next("resize", partition)
        self._show_limit(partition)
        tasks = BatchJobTasks(self._link.ranks, self._limit(partition))
        supervisor = Supervisor(self._program, self._run, self._show, tasks)
        if self._chain.cancelled:
            return self._end("cancelled")
        try:
            status = supervisor.supervise()
        except HpcAbsaError as error:
            self._end("failed", reason=str(error))
            raise
        return self._hand_over(status, supervisor.stopped_by)

    def _reason_to_exit(self) -> str | None:
        recorded = self._chain.record(self._link)
        if recorded.job_id != self._link.job_id:
            return f"job {recorded.job_id} is on record as this link"
        if self._chain.link(self._link.number + 1):
            return "the next link has been submitted"
        if finished(self._run):
            return "the run is done"
        return "the chain was cancelled" if self._chain.cancelled else None

    def _wait_for_previous_attempt(self) -> None:
        until = time.monotonic() + PREVIOUS_ATTEMPT_SECONDS
        lock = RunLock(self._run)
        while True:
            try:
                lock.acquire()
            except RunLockedError as error:
                if time.monotonic() > until:
                    raise
                self._show(
                    f"waiting for processes of the previous attempt to save and exit: {error}"
                )
                self._run.stop_request.touch()
                time.sleep(2)
            else:
                lock.release()
                return

    def _hand_over(self, status: ExitStatus, stopped_by: int | None) -> ExitStatus:
        """Continue in another job, leave it to Slurm to requeue this one, or end the chain."""
        if not self._chain.owned_by(self._link.job_id, self._restarts):
            self._show("a later attempt of this job has taken over")
            return ExitStatus.STOPPED
        if finished(self._run):
            return self._end("done")
        if status == ExitStatus.FAILED:
            self._end("failed", reason="too many failures without progress")
            return status
        if self._chain.cancelled:
            return self._end("cancelled")
        if stopped_by in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) and not self._preempted():
            return self._end("terminated", reason="Slurm or a user ends the job")
        # Not the end of an earlier job's phase, where this one began none.
        end = self._run.log.last("phase_end", "phase_start", "link") or {}
        resize = end.get("outcome") == "resize"
        if not resize and stopped_by is None:
            return self._end("stopped", reason="asked to by a file")
        return self._submit_next("resize" if resize else "time", self._partition())

    def _submit_next(self, reason: str, partition: Partition) -> ExitStatus:
        """Submit the next link; with the current size where Slurm refuses a larger one."""
        if reason == "time" and self._no_progress():
            self._end("failed", reason="no step within the time limit of several jobs")
            return ExitStatus.FAILED
        wanted, current = self._next_ranks(partition), self._link.ranks
        for ranks in (wanted, current):
            size = size_of(self._settings, ranks, partition)
            try:
                link = self._submit(size)
            except SubmissionError as error:
                self._end("failed", reason=str(error))
                raise
            except UsageError as error:
                if ranks <= current:
                    self._end("failed", reason=str(error))
                    raise
                self._show(f"Slurm refuses {size} ({error}); gradients are accumulated instead")
                self._chain.log(self._link, "refused", ranks=ranks, reason=str(error))
            else:
                self._show(f"link {link.number}: job {link.job_id}, {size}")
                return self._end(reason, next_job=link.job_id)
        raise AssertionError("the current size was submitted or refused")

    def _submit(self, size: Size) -> Link:
        number = self._link.number + 1
        name = self._chain.name(number)
        allow = self._program.allow_changed
        text = script(self._settings, self._run, number, name, size, allow)
        return retry_while_silent(
            lambda: self._chain.submit(number, text, size.nodes, size.ranks, self._slurm),
            SLURM_SECONDS,
        )

    def _end(self, outcome: str, **fields: object) -> ExitStatus:
        self._chain.log(self._link, "ended", outcome=outcome, step=self._step(), **fields)
        return ExitStatus.OK if outcome in ("done", "resize", "time") else ExitStatus.STOPPED

    def _partition(self) -> Partition:
        name = os.environ.get("SLURM_JOB_PARTITION") or self._settings.launch.slurm.partition
        return retry_while_silent(lambda: self._slurm.partition(name), SLURM_SECONDS)

    def _next_ranks(self, partition: Partition) -> int:
        return next_ranks(self._program, self._run, self._limit(partition))

    def _limit(self, partition: Partition) -> int:
        """Ranks that one job of the partition can have, fewer than Slurm refused within a day."""

        def is_recent(seconds: object) -> bool:
            return isinstance(seconds, int | float) and seconds > time.time() - REFUSAL_SECONDS

        refused = [
            event["ranks"] - 1
            for event in link_events(self._run.log.read())
            if event["action"] == "refused"
            and isinstance(event.get("ranks"), int)
            and is_recent(event.get("time"))
        ]
        return max(1, min([most_ranks(self._settings, partition), *refused]))

    def _show_limit(self, partition: Partition) -> None:
        if not self._run.job.exists():  # a script whose first phase has not begun
            return
        job = self._program.job(self._run)
        limit, largest = self._limit(partition), job.schedule.largest_batch
        ranks = worldsize.ranks_for(job, largest, job.ranks.max or largest)
        if ranks > limit:
            self._show(
                f"partition {partition.name} gives one job at most {partition.max_nodes} nodes "
                f"now: batches that could use more than {limit} ranks are accumulated"
            )

    def _preempted(self) -> bool:
        """Whether a SIGTERM was the beginning of a preemption's grace time."""
        try:
            return self._slurm.preempted(self._link.job_id)
        except (SlurmSilentError, UsageError):
            return False

    def _no_progress(self) -> bool:
        """Whether this link and the ones before it took no step until their time limits."""
        steps = [
            event.get("step")
            for event in link_events(self._run.log.read())
            if event["action"] == "ended"
        ]
        recent = steps[-MOST_IDLE_LINKS:]
        return len(recent) == MOST_IDLE_LINKS and set(recent) == {self._step()}

    def _step(self) -> int:
        return self._run.newest_step() or 0
