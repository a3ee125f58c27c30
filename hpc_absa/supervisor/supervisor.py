"""`hpc-absa run` and `launch`: a run from its first phase to its last."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.util import find_spec
from types import FrameType

from hpc_absa import allocation
from hpc_absa.config import Launch
from hpc_absa.errors import ExitStatus, HpcAbsaError, RunDirError, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import RunLock
from hpc_absa.supervisor import run_state
from hpc_absa.supervisor.fork_server import OF_SCRIPTS, ForkServer, represented
from hpc_absa.supervisor.launchers import Command, command, outside_settings
from hpc_absa.supervisor.process import Exit, Failure, LauncherProcess
from hpc_absa.supervisor.program import JobProgram, Program
from hpc_absa.supervisor.resources import Resources, only_here, resources_of

AFTER_A_STEP = ("progress", "epoch", "decision", "checkpoint", "phase_end")
"""Events that ranks write after a step."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def on_stop(handler: Callable[[int, FrameType | None], None]) -> None:
    """Handle the signals that ask for a stop; SIGHUP (a lost terminal) not under nohup."""
    for number in STOP_SIGNALS:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, handler)


class FinalError(HpcAbsaError):
    """A configuration error; restarting would fail the same way."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.status = ExitStatus(failure.exit_code or ExitStatus.FAILED)


class Supervisor:
    """Launches phase after phase until the run is done, is stopped, or fails too often."""

    def __init__(
        self,
        program: Program,
        run: RunDir,
        show: Callable[[str], None] = print,
        resources: Resources | None = None,
    ) -> None:
        """`show` is called with every line for the user."""
        self._program, self._run, self._show = program, run, show
        self._settings = program.settings
        self._resources = resources or resources_of(self._settings, self._on_host_change)
        self._lock = RunLock(run)
        self._process: LauncherProcess | None = None
        forks, is_job = self._settings.launch.fork_server, isinstance(program, JobProgram)
        modules = () if is_job else OF_SCRIPTS
        forks = is_job if forks is None else forks
        self._fork_server = ForkServer(run, modules) if forks else None
        self._ending: list[LauncherProcess] = []
        """Launchers without ranks, after a failure."""
        self._ranks, self._launched = 0, 0.0
        self._slots = 0
        """Of the ranks; fewer than there are ranks where slots are shared."""
        self._only_here = False
        self._rehearsed = False
        """Ranks of this supervisor took a step: the rehearsal before it need not be repeated."""
        self._relaunching = False
        """The ranks were asked to save and exit so that a returned host can be used."""
        self.stopped_by: int | None = None
        """The first signal that asked for a stop."""
        self._signals = self._signals_handled = 0

    def supervise(self) -> ExitStatus:
        """Run to the end; returns the exit status of the command."""
        self._claim()
        try:
            self._program.write(self._run)
            self._run.stop_request.unlink(missing_ok=True)  # of an earlier command
            on_stop(self._on_signal)
            return self._supervise()
        finally:
            for launcher in self._ending:
                launcher.finish()
            with suppress(OSError):  # of ranks that were ended after the failure was read
                self._run.failure.unlink(missing_ok=True)
            if self._fork_server:
                self._fork_server.close(ranks_ended=self._process is None)
            self._run.stop_request.unlink(missing_ok=True)
            self._lock.release()

    def launch_command(self, fresh: bool = False) -> Command:
        """The command of the next phase, or of a new run's first one."""
        available = self._resources.available()
        ranks = self._program.initial_ranks(available) if fresh else self._next_ranks(available)
        return self._command(ranks)[0]

    def _claim(self) -> None:
        if find_spec("horovod") is None:
            raise UsageError(
                f"Horovod is not installed for {sys.executable}; launch/bootstrap.sh builds an "
                "environment that has it"
            )
        self._run.create()
        self._lock.acquire()

    def _supervise(self) -> ExitStatus:
        restarts = run_state.RestartCounter(self._run)
        most_restarts = self._settings.launch.max_restarts
        previous: Failure | None = None
        while True:
            outcome = self._run_phase()
            if outcome == "done":
                return ExitStatus.OK
            if isinstance(outcome, Failure) and outcome.final and self._signals < 2:
                with suppress(RunDirError):  # of a full disk, say; the error itself counts
                    self._run.log.append("error", None, reason=outcome.reason)
                raise FinalError(outcome)
            if self._relaunching and outcome == "stopped" and not self._signals:
                continue
            if self._signals or outcome in ("stopped", "ended"):
                saved = outcome in ("stopped", "resize")
                how = "stopped, everything saved" if saved else "stopped without saving"
                self._show(f"{how}; run the same command to continue")
                return ExitStatus.STOPPED
            if outcome == "resize":
                maximum, available = self._resources.maximum(), self._resources.available()
                if maximum > available and self._next_ranks(maximum) > available:
                    return ExitStatus.OK  # the next batch job has as many
                if self._next_ranks(available) != self._ranks:
                    restarts.count = 0
                elif restarts.add() > most_restarts:
                    self._show(f"gave up: relaunched {self._ranks} ranks again without progress")
                    return ExitStatus.FAILED
                continue
            assert isinstance(outcome, Failure)
            self._report(outcome)
            self._resources.report_failure(outcome.host)
            if outcome.early and previous and outcome.exit_code == previous.exit_code:
                self._show("failed twice in the same way before its hpc_absa.Run; not restarted")
                return ExitStatus.FAILED
            previous = outcome if outcome.early else None
            if restarts.add() > most_restarts:
                self._show(
                    f"gave up after {most_restarts} restarts without progress; "
                    f"logs are in {self._run.logs}"
                )
                return ExitStatus.FAILED
            self._show(f"restart {restarts.count} of {most_restarts}")

    def _run_phase(self) -> str | Failure:
        """Launch ranks and wait for their end.

        Returns:
            done, resize, stopped, ended (at a request to stop, without saving), or why they failed.
        """
        if self._relaunching and not self._signals:
            self._run.stop_request.unlink(missing_ok=True)
        self._relaunching = False
        self._handle_signals()
        events_before = len(self._run.log.read())
        self._launch(events_before)
        assert self._process is not None
        with self._resources.watch(self._on_host_return):
            ended = self._process.wait(
                self._run,
                self._settings.launch.start_seconds,
                self._handle_signals,
                lambda: self._outcome(events_before) is not None,
                self._only_here,
            )
        if ended.seconds:
            self._ending.append(self._process)
        self._process = None
        new = self._run.log.read()[events_before:]
        self._rehearsed |= any(e["event"] in AFTER_A_STEP for e in new)
        if outcome := self._outcome(events_before):
            self._resources.report_success()
            if failure := self._program.failed_after(outcome, ended):
                self._show_traceback(None)
                if outcome == "done" and self._signals < 2:
                    raise FinalError(failure)  # without an event: the run itself is done
                if outcome == "done":
                    return failure
                self._show(f"warning: {failure.reason}")
            return "stopped" if outcome == "resize" and self._stop_requested(ended) else outcome
        if self._stop_requested(ended) and not self._run.failure.exists():
            return "ended"
        return replace(self._failure(ended), seconds=round(ended.seconds, 3))

    def _outcome(self, events_before: int) -> str | None:
        """How the ranks ended their last phase; None if they did not."""
        ends = [e for e in self._run.log.read()[events_before:] if e["event"] == "phase_end"]
        outcome = ends[-1].get("outcome") if ends else None
        return outcome if outcome in ("done", "resize", "stopped") else None

    def _launch(self, number: int) -> None:
        available = self._resources.available()
        self._ranks = self._next_ranks(available)
        self._slots = min(self._ranks, available)
        shown, launch = self._command(self._ranks)
        places = [f"ranks on {launch.hosts}"] if launch.hosts else []
        bound = launch.bind == "core" and launch.launcher == "mpirun"
        places += ["bound to cores"] if bound else []
        if places:
            self._show(", ".join(places))
        for left in (self._run.joined, self._run.failure):  # by ranks of the launch before
            left.unlink(missing_ok=True)
        log = self._run.logs / f"world-{number:06d}-{self._settings.launch.launcher}.log"
        try:
            with log.open("a", encoding="utf-8") as file:
                file.write(f"$ {shown}\n")
        except OSError as error:
            raise RunDirError(f"{log}: cannot be written: {error.strerror or error}") from None
        self._launched = time.time()
        start = self._command(self._ranks, represent=True)[0]
        self._process = LauncherProcess(start, log, self._lock.descriptor, self._show)
        # While the ranks start: the next launch reads a checkpoint, and the import takes 0.2 s.
        import hpc_absa.checkpoint  # noqa: F401

    def _command(self, ranks: int, represent: bool = False) -> tuple[Command, Launch]:
        """The command that starts `ranks` ranks, and where it starts them.

        With `represent`, ranks of this host are below processes of ours (`forked_rank.py`).
        """
        settings = self._resources.place(self._settings, ranks)
        # After the loss of a host there may be fewer slots than initial ranks.
        most = max(self._resources.maximum(), settings.ranks.initial)
        launch, worker = settings.launch, self._program.worker(self._run, most)
        if self._rehearsed:
            worker = replace(worker, environment=worker.environment | {allocation.REHEARSED: "1"})
        self._only_here = only_here(launch)
        if represent and self._only_here:
            server = None if launch.extra else self._fork_server
            address = server.address(worker) if server else ""
            worker = represented(worker, self._run, address)
        return command(settings, ranks, worker), launch

    def _next_ranks(self, limit: int) -> int:
        return run_state.next_ranks(self._program, self._run, limit)

    def _stop_requested(self, ended: Exit) -> bool:
        """Whether a stop was requested, also where it came before or after the ranks listen."""
        if ended.fatal_signal() in STOP_SIGNALS and not ended.start_timed_out:
            return True
        return self._run.stop_request.exists() and not self._relaunching

    def _failure(self, ended: Exit) -> Failure:
        """From the file that the failed rank left, otherwise from the launcher's exit."""
        with suppress(OSError, ValueError):  # none, or cut off by a full disk
            return Failure(**json.loads(self._run.failure.read_text(encoding="utf-8")))
        if ended.start_timed_out:
            seconds = self._settings.launch.start_seconds
            reason = f"the ranks had not connected to each other after {seconds:g} s"
            return Failure(reason + _outside_settings())
        if killed := ended.killed_rank():
            rank, host, number = killed
            return Failure(f"killed by {signal.Signals(number).name}", rank, host, 128 + number)
        if ended.code < 0:
            name = signal.Signals(-ended.code).name
            return Failure(f"the launcher was killed by {name}", exit_code=128 - ended.code)
        if failure := self._program.failed(ended, began=self._run.joined.exists()):
            return failure
        line = next((line for line in reversed(ended.tail) if line.strip(" -")), "none")
        reason = f"the launcher exited; its last line: {line}"
        return Failure(reason + _outside_settings(), exit_code=ended.code)

    def _report(self, failure: Failure) -> None:
        place = f"rank {failure.rank} on {failure.host}: " if failure.rank is not None else ""
        self._show_traceback(failure.rank)
        self._show(f"failed: {place}{failure.reason}")
        fields = asdict(failure)
        del fields["final"], fields["early"]
        self._run.log.append("failure", None, **fields)

    def _show_traceback(self, rank: int | None) -> None:
        for line in self._program.traceback(self._run, rank, self._launched):
            self._show(line)

    def _on_host_change(self, host: str, action: str, reason: str) -> None:
        self._show(f"host {host}: {action.replace('_', ' ')}, {reason}")
        self._run.log.append("host", host=host, action=action, reason=reason)

    def _on_host_return(self) -> None:
        """Where ranks get more slots now, have the running ones save and exit."""
        available = self._resources.available()
        if min(self._next_ranks(available), available) > self._slots:
            self._relaunching = True
            self._run.stop_request.touch()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP and self.stopped_by:
            return  # a lost terminal sends several; none is a second Ctrl-C
        self._signals += 1
        self.stopped_by = self.stopped_by or number

    def _handle_signals(self) -> None:
        """After the first signal ask the ranks to save and stop; after the second end them."""
        if self._signals == self._signals_handled:
            return
        self._signals_handled = self._signals
        self._run.stop_request.touch()
        if self._signals > 1 and self._process:
            self._process.kill()


def _outside_settings() -> str:
    """The end of a reason for which such settings may be the cause."""
    settings = outside_settings()
    return f" (set outside of the job: {', '.join(settings)})" if settings else ""
