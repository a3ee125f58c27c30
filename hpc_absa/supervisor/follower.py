"""Launcher `slurm`: starts or continues a chain of batch jobs and shows its output.

The chain does not need this process. It may be killed at any time, and the same command, on any
host that sees the run directory, follows the chain again.
"""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable

from hpc_absa.errors import ExitStatus, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.supervisor import run_state
from hpc_absa.supervisor.batch import Size, most_ranks, script, size_of
from hpc_absa.supervisor.chain import Chain, Link, link_events
from hpc_absa.supervisor.program import Program
from hpc_absa.supervisor.slurm import QueuedJob, Slurm, SlurmSilentError, retry_while_silent
from hpc_absa.supervisor.supervisor import on_stop

INTERVAL = 2.0
"""Seconds between reads of the run directory."""
QUEUE_EVERY = 5
"""Reads of the run directory per squeue: sites dislike an squeue a second."""
SUBMIT_SECONDS = 60.0
"""A submission is repeated for so long while slurmctld does not answer."""


class Follower:
    """Watches one chain."""

    def __init__(
        self,
        program: Program,
        run: RunDir,
        show: Callable[[str], None] = print,
        interval: float = INTERVAL,
    ) -> None:
        """`show` is called with every line for the user."""
        self._program, self._settings = program, program.settings
        self._run, self._show, self._interval = run, show, interval
        self._slurm, self._chain = Slurm(), Chain(run, program.settings.name)
        self._bytes_shown: dict[int, int] = {}
        self._last_state = ""
        self._was_cancelled = False
        """By scancel, according to the last answer of Slurm about the last link's job."""

    def dry_run(self, fresh: bool = False) -> str:
        """Submission and script of the next link, or of a new run's first, as to be executed."""
        number, size = self._next(fresh)
        return f"{shlex.join(self._chain.submission(number))}\n{self._script(number, size)}"

    def follow(self) -> ExitStatus:
        """Submit the next link if none is pending or running, then watch until the chain ends."""
        restarts = run_state.RestartCounter(self._run)
        most_restarts = self._settings.launch.max_restarts
        self._start()
        try:
            on_stop(signal.default_int_handler)
            while (status := self._watch()) is None:
                if restarts.add() > most_restarts:
                    self._show(f"gave up after {most_restarts} jobs that ended without progress")
                    return ExitStatus.FAILED
                self._show(f"submitting again, {restarts.count} of {most_restarts}")
                self._submit()
            return status
        except KeyboardInterrupt:
            self._show(
                "no longer watching; the chain continues without this command. The same command "
                f"watches again, {self._cancel_command()} ends the chain"
            )
            return ExitStatus.STOPPED

    def refuse_if_active(self) -> None:
        """Check before a run directory is removed.

        Raises:
            UsageError: a batch job of its chain is pending or running.
        """
        last = self._chain.last()
        if last and self._queued(last):
            raise UsageError(
                f"{self._run.path}: its job {last.job_id} is pending or running; "
                f"first {self._cancel_command()}"
            )

    def _cancel_command(self) -> str:
        return shlex.join(["hpc-absa", "cancel", str(self._run.path)])

    def _start(self) -> None:
        last = self._chain.last()
        if last and self._queued(last):
            self._show(f"link {last.number} (job {last.job_id}) is pending or running; watching")
            return
        self._run.create()
        self._program.write(self._run)
        self._run.stop_request.unlink(missing_ok=True)  # of an earlier command
        self._chain.resume()
        self._submit()

    def _submit(self) -> None:
        number, size = retry_while_silent(self._next, SUBMIT_SECONDS)
        text = self._script(number, size)
        link = retry_while_silent(
            lambda: self._chain.submit(number, text, size.nodes, size.ranks, self._slurm),
            SUBMIT_SECONDS,
        )
        self._show(f"link {link.number}: job {link.job_id}, {size}")

    def _next(self, fresh: bool = False) -> tuple[int, Size]:
        """Number and size of the next link, or of a new run's first one."""
        default = os.environ.get("SBATCH_PARTITION", "")
        partition = self._slurm.partition(self._settings.launch.slurm.partition or default)
        limit, initial = most_ranks(self._settings, partition), self._settings.ranks.initial
        if limit < initial:
            raise UsageError(
                f"ranks.initial = {initial}: partition {partition.name} has nodes "
                f"for {limit} ranks now; start with fewer, or set launch.ranks_per_node"
            )
        if fresh:
            return 1, size_of(self._settings, self._program.initial_ranks(limit), partition)
        ranks = run_state.next_ranks(self._program, self._run, limit)
        last = self._chain.last()
        return (last.number + 1 if last else 1), size_of(self._settings, ranks, partition)

    def _script(self, number: int, size: Size) -> str:
        name = self._chain.name(number)
        return script(self._settings, self._run, number, name, size, self._program.allow_changed)

    def _watch(self) -> ExitStatus | None:
        """Show output until the chain ends; None where it ended without a result."""
        reads = 0
        while True:
            self._show_output()
            last = self._chain.last()
            assert last is not None
            done = run_state.finished(self._run) is not None  # the job may still write the report
            if (done or reads % QUEUE_EVERY == 0) and not self._alive(last):
                self._show_output()
                # The last link may have submitted another one before it ended.
                if self._chain.last() == last:
                    return self._result(last)
            reads += 1
            time.sleep(self._interval)

    def _result(self, last: Link) -> ExitStatus | None:
        if run_state.finished(self._run):
            return ExitStatus.OK
        match self._outcome(last):
            case "failed":
                self._show(f"the chain failed; logs are in {self._run.logs}")
                return ExitStatus.FAILED
            case "stopped" | "cancelled" | "terminated":
                self._show("stopped; run the same command to continue")
                return ExitStatus.STOPPED
            case _:
                name = f"link {last.number} (job {last.job_id})"
                if self._chain.cancelled or self._was_cancelled:
                    self._show(f"{name} was cancelled; run the same command to continue")
                    return ExitStatus.STOPPED
                self._show(f"{name} exited without writing a result")
                return None

    def _outcome(self, link: Link) -> str:
        events = [e for e in link_events(self._run.log.read()) if e["link"] == link.number]
        return str(events[-1].get("outcome", "")) if events else ""

    def _alive(self, link: Link) -> bool:
        """Whether the link's job is pending or running; assumed while Slurm does not answer."""
        try:
            job = self._job(link)
        except SlurmSilentError as error:
            self._show_state(f"Slurm does not answer at the moment ({error})")
            return True
        self._was_cancelled = job is not None and job.state == "CANCELLED"
        if job and job.alive:
            reason = f", {job.reason}" if job.state == "PENDING" else ""
            state = f"{job.state.lower()}{reason}"
            self._show_state(f"link {link.number} (job {link.job_id}): {state}")
        return job is not None and job.alive

    def _queued(self, link: Link) -> bool:
        job = self._job(link)
        return job is not None and job.alive

    def _job(self, link: Link) -> QueuedJob | None:
        """The link's job, also one that has just ended; None where Slurm does not list it."""
        return next((j for j in self._slurm.jobs(link.name) if j.job_id == link.job_id), None)

    def _show_state(self, line: str) -> None:
        if line != self._last_state:
            self._show(line)
        self._last_state = line

    def _show_output(self) -> None:
        """Show the complete lines that the links have printed since the last call."""
        for link in self._chain.links():
            shown = self._bytes_shown.get(link.number, 0)
            try:
                with self._run.link_log(link.number).open("rb") as file:
                    file.seek(shown)
                    text = file.read()
            except OSError:
                continue
            complete = text[: text.rfind(b"\n") + 1]
            self._bytes_shown[link.number] = shown + len(complete)
            for line in complete.decode(errors="replace").splitlines():
                self._show(line)
