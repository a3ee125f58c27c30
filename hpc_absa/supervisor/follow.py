"""`hpc-absa run --launcher slurm`: begins or mends a chain of batch jobs, and shows its progress.

The chain needs nobody: this process may be killed at any time, on a login node or anywhere that
sees the run directory, and the same command follows the chain again.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

from hpc_absa import config, worldsize
from hpc_absa.config import Job
from hpc_absa.errors import ExitStatus, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.supervisor import driver
from hpc_absa.supervisor.batch import Size, most_ranks, script, size_of
from hpc_absa.supervisor.chain import Chain, Link
from hpc_absa.supervisor.slurm import QueuedJob, Slurm, SlurmSilentError, patiently, submission

PAUSE = 2.0
"""Seconds between looks at the run directory; Slurm is asked less often."""
ASK_EVERY = 5
"""Looks at the run directory for one at the queue: sites dislike an squeue a second."""


class Detached(BaseException):
    """The user has seen enough."""


class Follower:
    """Watches one chain."""

    def __init__(
        self,
        job: Job,
        run: RunDir,
        allow_changed: tuple[str, ...],
        show: Callable[[str], None] = print,
        pause: float = PAUSE,
    ) -> None:
        """`show` gets every line for people."""
        self._job, self._run, self._allow, self._show = job, run, allow_changed, show
        self._slurm, self._chain, self._pause = Slurm(), Chain(run, job.name), pause
        self._read: dict[int, int] = {}
        self._told = ""

    def dry(self) -> str:
        """The next link's submission and script, as they would be executed."""
        number, size = self._next()
        before = self._chain.link(number - 1)
        path = self._run.link_script(number).resolve()
        words = submission(path, before.job_id if before else None)
        return f"{' '.join(words)}\n{self._text(number, size)}"

    def follow(self) -> ExitStatus:
        """Submit the next link where none is at work, then watch until the chain is at an end."""
        restarts, best = 0, self._step()
        self._begin()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, _detach)
        try:
            while (status := self._watch()) is None:
                reached = self._step()
                restarts = 1 if reached > best else restarts + 1
                best = max(best, reached)
                if restarts > self._job.launch.max_restarts:
                    self._show(f"gave up after {restarts - 1} jobs that ended without progress")
                    return ExitStatus.FAILED
                self._show(f"submitting again, {restarts} of {self._job.launch.max_restarts}")
                self._submit()
            return status
        except Detached:
            self._show(
                "no longer watching; the chain goes on by itself. The same command watches again, "
                f"hpc-absa cancel {self._run.path} ends it"
            )
            return ExitStatus.STOPPED

    def refuse_if_at_work(self) -> None:
        """Before a run directory is removed.

        Raises:
            UsageError: a batch job of its chain waits or works.
        """
        last = self._chain.last()
        if last and self._state(last):
            raise UsageError(
                f"{self._run.path}: its job {last.job_id} waits or works; "
                f"first hpc-absa cancel {self._run.path}"
            )

    def _begin(self) -> None:
        """Watch the chain that is at work, or let one go on from what is saved."""
        last = self._chain.last()
        if last and self._state(last):
            self._show(f"link {last.number} (job {last.job_id}) is at work; watching")
            return
        self._run.create()
        if self._run.job.exists() and self._run.checkpoint_files():
            saved = config.load(self._run.job, warn=False)
            config.refuse_changes(saved, self._job, str(self._run.job), self._allow)
        self._run.write_job(config.dump(self._job))
        self._run.stop_request.unlink(missing_ok=True)
        self._chain.allow()
        self._submit()

    def _submit(self) -> None:
        number, size = self._next()
        text = self._text(number, size)
        link = patiently(
            lambda: self._chain.submit(number, text, size.nodes, size.ranks, self._slurm), 60.0
        )
        self._show(f"link {link.number}: job {link.job_id}, {size}")

    def _next(self) -> tuple[int, Size]:
        """Number and size of the link that goes on from what is saved."""
        partition = self._slurm.partition(self._job.launch.slurm.partition)
        most = most_ranks(self._job, partition)
        if most < self._job.ranks.initial:
            raise UsageError(
                f"ranks.initial = {self._job.ranks.initial}: partition {partition.name} has nodes "
                f"for {most} ranks now; start with fewer, or set launch.ranks_per_node"
            )
        ranks = worldsize.ranks_for(self._job, driver.present_batch(self._job, self._run), most)
        last = self._chain.last()
        return (last.number + 1 if last else 1), size_of(self._job, ranks, partition)

    def _text(self, number: int, size: Size) -> str:
        name = self._chain.name(number)
        return script(self._job, self._run, number, name, size, self._allow)

    # Watching

    def _watch(self) -> ExitStatus | None:
        """Show progress until the chain is at an end; None where it broke off and may be mended."""
        looks = 0
        while True:
            self._show_new()
            last = self._chain.last()
            assert last is not None
            done = driver.finished(self._run) is not None  # its job has the report to write yet
            if (done or looks % ASK_EVERY == 0) and not self._alive(last):
                self._show_new()
                # the last link may have submitted another, or ended in order, since we looked
                if self._chain.last() == last:
                    return self._ending(last)
            looks += 1
            time.sleep(self._pause)

    def _ending(self, last: Link) -> ExitStatus | None:
        """What the last word of the chain's last link means."""
        if driver.finished(self._run):
            return ExitStatus.OK
        match self._last_word(last):
            case "failed":
                self._show(f"the chain failed; logs are in {self._run.logs}")
                return ExitStatus.FAILED
            case "stopped" | "cancelled" | "terminated":
                self._show("stopped, everything saved; the same command goes on from here")
                return ExitStatus.STOPPED
            case _:
                if self._chain.cancelled:
                    return ExitStatus.STOPPED
                self._show(f"link {last.number} (job {last.job_id}) is gone without a word")
                return None

    def _last_word(self, link: Link) -> str:
        told = [
            event
            for event in self._run.log.read()
            if event["event"] == "link" and event["link"] == link.number
        ]
        return str(told[-1].get("outcome", "")) if told else ""

    def _alive(self, link: Link) -> bool:
        """Whether the link's job waits or works; it is believed to while Slurm does not answer."""
        try:
            job = self._state(link)
        except SlurmSilentError as error:
            self._tell(f"Slurm does not answer for now ({error})")
            return True
        if job:
            waits = f", {job.reason}" if job.state == "PENDING" else ""
            self._tell(f"link {link.number} (job {link.job_id}): {job.state.lower()}{waits}")
        return job is not None

    def _state(self, link: Link) -> QueuedJob | None:
        """The link's job in the queue, None when it is over."""
        found = [job for job in self._slurm.jobs(link.name) if job.job_id == link.job_id]
        return found[0] if found and found[0].alive else None

    def _tell(self, line: str) -> None:
        """Show a line unless it was the last one told."""
        if line != self._told:
            self._show(line)
        self._told = line

    def _show_new(self) -> None:
        """Show what the links have printed since the last look."""
        for link in self._chain.links():
            path, seen = self._run.link_log(link.number), self._read.get(link.number, 0)
            try:
                with path.open("rb") as file:
                    file.seek(seen)
                    text = file.read()
            except OSError:
                continue
            whole = text[: text.rfind(b"\n") + 1]
            self._read[link.number] = seen + len(whole)
            for line in whole.decode(errors="replace").splitlines():
                self._show(line)

    def _step(self) -> int:
        return -1 if (step := self._run.newest_step()) is None else step


def _detach(number: int, frame: FrameType | None) -> None:
    raise Detached
