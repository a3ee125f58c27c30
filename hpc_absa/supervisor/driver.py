"""`hpc-absa run`: a job from its first phase to its last."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from hpc_absa import config, worldsize
from hpc_absa.config import Job
from hpc_absa.errors import ExitStatus, HpcAbsaError, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event, effective
from hpc_absa.rundir.lock import RunLock
from hpc_absa.schedules import build
from hpc_absa.supervisor.launchers import Command, command
from hpc_absa.supervisor.resources import Resources, resources_of
from hpc_absa.supervisor.world import Ending, World

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Failure:
    """Why a world ended before its time."""

    reason: str
    rank: int | None = None
    host: str | None = None
    exit_code: int | None = None
    final: bool = False
    """Another try would fail the same way."""


class FinalError(HpcAbsaError):
    """The user's own to mend; starting again would end the same way."""

    def __init__(self, failure: Failure) -> None:
        """Exits with the status that the ranks agreed on."""
        super().__init__(failure.reason)
        self.status = ExitStatus(failure.exit_code or ExitStatus.FAILED)


class Supervisor:
    """Launches one world after the other until the job is done, stopped, or beyond help."""

    def __init__(
        self,
        job: Job,
        run: RunDir,
        allow_changed: tuple[str, ...],
        show: Callable[[str], None] = print,
        resources: Resources | None = None,
    ) -> None:
        """`show` gets every line for people; `resources` are those of the job unless given."""
        self._job, self._run, self._allow, self._show = job, run, allow_changed, show
        self._resources = resources or resources_of(job, self._tell_host)
        self._moving = False
        self.stopped_by: int | None = None
        """The first signal that asked for a stop."""
        self._lock = RunLock(run)
        self._world: World | None = None
        self._stops = self._obeyed = 0

    def supervise(self) -> ExitStatus:
        """Run the job to its end; the status `hpc-absa run` exits with."""
        self._claim()
        try:
            for number in STOPS:
                signal.signal(number, self._on_signal)
            return self._supervise()
        finally:
            self._run.stop_request.unlink(missing_ok=True)
            self._lock.release()

    def launch_command(self) -> Command:
        """The command of the next phase."""
        return self._placed()[1]

    def _placed(self) -> tuple[int, Command, str]:
        """Ranks of the next world, its command, and for people where it will be."""
        ranks = self._ranks()
        job = self._resources.placed(self._job, ranks)
        bound = ", bound to cores" if job.launch.bind == "core" else ""
        where = f"ranks on {job.launch.hosts}{bound}" if job.launch.hosts else bound[2:]
        return ranks, command(job, ranks, self._worker()), where

    def _supervise(self) -> ExitStatus:
        restarts, best = 0, self._newest_step()
        while True:
            outcome = self._phase()
            if outcome == "done":
                return ExitStatus.OK
            if self._moving and outcome == "stopped" and not self._stops:
                continue
            if self._stops or outcome == "stopped":
                self._show("stopped, everything saved; the same command goes on from here")
                return ExitStatus.STOPPED
            if outcome == "resize":
                restarts = 0
                if self._wanted(self._resources.most()) > self._resources.here():
                    return ExitStatus.OK  # the next batch job is as large as that
                continue
            assert isinstance(outcome, Failure)
            if outcome.final:
                raise FinalError(outcome)
            self._report(outcome)
            self._resources.failed(outcome.host)
            reached = self._newest_step()
            restarts = 1 if reached > best else restarts + 1
            best = max(best, reached)
            if restarts > self._job.launch.max_restarts:
                self._show(
                    f"gave up after {self._job.launch.max_restarts} restarts without progress; "
                    f"logs are in {self._run.logs}"
                )
                return ExitStatus.FAILED
            self._show(f"restart {restarts} of {self._job.launch.max_restarts}")

    def _claim(self) -> None:
        """Make the run directory this run's: its lock, its job file, no leftovers."""
        if find_spec("horovod") is None:
            raise UsageError(
                f"Horovod is not installed for {sys.executable}; launch/bootstrap.sh builds an "
                "environment that has it"
            )
        job = self._job
        self._run.create()
        self._lock.acquire()
        if self._run.job.exists() and self._run.checkpoint_files():
            saved = config.load(self._run.job, warn=False)
            config.refuse_changes(saved, job, str(self._run.job), self._allow)
        self._run.write_job(config.dump(job))
        self._run.stop_request.unlink(missing_ok=True)
        self._run.failure.unlink(missing_ok=True)

    def _phase(self) -> str | Failure:
        """One world from its start to its end: done, resize, stopped, or why it failed."""
        if self._moving and not self._stops:
            self._run.stop_request.unlink(missing_ok=True)
        self._moving = False
        self._obey()
        known = len(self._run.log.read())
        self._world_ranks, start, where = self._placed()
        if where:
            self._show(where)
        self._run.joined.unlink(missing_ok=True)
        log = self._run.logs / f"world-{known:06d}-{self._job.launch.launcher}.log"
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {start}\n")
        self._world = World(start, log, self._lock.descriptor, self._show)
        with self._resources.watching(self._move):
            patience = self._job.launch.start_seconds
            ending = self._world.wait(self._run.joined, patience, self._obey)
        self._world = None
        ended = [e for e in self._run.log.read()[known:] if e["event"] == "phase_end"]
        if ended and ended[-1]["outcome"] in ("done", "resize", "stopped"):
            self._run.failure.unlink(missing_ok=True)
            self._resources.succeeded()
            outcome = str(ended[-1]["outcome"])
            return "stopped" if outcome == "resize" and self._asked(ending) else outcome
        if self._asked(ending) and not self._run.failure.exists():
            return "stopped"
        return self._failure(ending)

    def _asked(self, ending: Ending) -> bool:
        """Whether the world was asked to stop when its ranks did not listen: early, or late."""
        told = ending.fatal_signal() in STOPS and not ending.late
        return told or (self._run.stop_request.exists() and not self._moving)

    def _failure(self, ending: Ending) -> Failure:
        """The rank's own word where it left one, otherwise what the launcher said."""
        try:
            left: dict[str, Any] = json.loads(self._run.failure.read_text(encoding="utf-8"))
            self._run.failure.unlink()
            return Failure(**left)
        except (OSError, ValueError):
            pass
        if ending.late:
            limit = self._job.launch.start_seconds
            return Failure(f"its ranks had not found each other after {limit:g} s")
        if killed := ending.killed_rank():
            rank, host, number = killed
            name = signal.Signals(number).name
            return Failure(f"killed by {name}", rank, host, 128 + number)
        if ending.exit_code < 0:
            name = signal.Signals(-ending.exit_code).name
            return Failure(f"the launcher was killed by {name}", exit_code=128 - ending.exit_code)
        said = next((line for line in reversed(ending.tail) if line.strip(" -")), "nothing")
        return Failure(f"the launcher exited and last said: {said}", exit_code=ending.exit_code)

    def _report(self, failure: Failure) -> None:
        place = f"rank {failure.rank} on {failure.host}: " if failure.rank is not None else ""
        self._show(f"failed: {place}{failure.reason}")
        self._run.log.append(
            "failure",
            None,
            reason=failure.reason,
            rank=failure.rank,
            host=failure.host,
            exit_code=failure.exit_code,
        )

    def _move(self) -> None:
        """A host is back: where the batch feeds its ranks, have the world save and make room."""
        if self._ranks() > self._world_ranks:
            self._moving = True
            self._run.stop_request.touch()

    def _tell_host(self, host: str, action: str, why: str) -> None:
        self._show(f"host {host}: {action.replace('_', ' ')}, {why}")
        self._run.log.append("host", host=host, action=action, reason=why)

    def _ranks(self) -> int:
        """Ranks of the next world: those that the present global batch can feed."""
        return self._wanted(min(self._resources.here(), self._resources.most()))

    def _wanted(self, limit: int) -> int:
        return worldsize.ranks_for(self._job, present_batch(self._job, self._run), limit)

    def _worker(self) -> tuple[str, ...]:
        words = [sys.executable, "-m", "hpc_absa", "train", str(self._run.job.resolve())]
        words += ["--run-dir", str(self._run.path.resolve())]
        if self._job.ranks.max != (most := self._resources.most()):
            words += ["--set", f"ranks.max={most}"]
        for key in self._allow:
            words += ["--allow-changed", key]
        return tuple(words)

    def _newest_step(self) -> int:
        """Steps behind the newest checkpoint, by its name; -1 without any."""
        return -1 if (step := self._run.newest_step()) is None else step

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stops += 1
        self.stopped_by = self.stopped_by or number

    def _obey(self) -> None:
        """After a first signal, ask the ranks to save and stop; after a second, end them now."""
        if self._stops == self._obeyed:
            return
        self._obeyed = self._stops
        self._run.stop_request.touch()
        if self._stops > 1 and self._world:
            self._world.kill()


def present_batch(job: Job, run: RunDir) -> int:
    """The global batch of the next step, by the run's events."""
    batch = build(job).initial().global_batch
    for event in effective(run.log.read()):
        batch = event.get("next_batch") or event.get("global_batch") or batch
    return batch


def finished(run: RunDir) -> Event | None:
    """The `done` event of a run that is over."""
    last = [e for e in run.log.read() if e["event"] == "done"][-1:]
    return last[0] if last else None


def clear(run: RunDir) -> None:
    """Remove a run's files to begin anew.

    Raises:
        UsageError: the folder holds something that is no run.
        RunLockedError: a supervisor is at work on it.
    """
    if not run.path.exists():
        return
    lock = RunLock(run)
    if run.is_run:
        lock.acquire()
    try:
        run.remove_files()
    finally:
        lock.release()


def default_run_dir(job: Job) -> Path:
    """Where a run goes unless told: `runs/` under the present folder."""
    return Path("runs") / job.name
