"""`hpc-absa train`: the entry point of one rank, from connecting to its exit status."""

from __future__ import annotations

import faulthandler
import gc
import io
import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from hpc_absa import config
from hpc_absa.allocation import launcher_rank, requested_ranks
from hpc_absa.comm import Communicator, connect, raise_on_all_ranks
from hpc_absa.config import Job
from hpc_absa.console import tolerant
from hpc_absa.errors import CollectiveError, ExitStatus, MisuseError, RunDirError, UsageError
from hpc_absa.plugins import described
from hpc_absa.records import PhaseOutcome
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import SUPERVISED, RunLock, host
from hpc_absa.training.calls import Calls
from hpc_absa.training.clock import Clock
from hpc_absa.training.faults import StopRequest, Watchdog
from hpc_absa.training.setup import build_trainer


def main(
    job_path: Path, run_path: Path, overrides: tuple[str, ...], allow_changed: tuple[str, ...]
) -> int:
    """Run one rank; returns the exit status of the process, or ends all ranks on an error."""
    # Until this rank handles signals, Ctrl-C ends it like other signals, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    comm = connect()
    gc.freeze()  # what the imports created stays
    gc.enable()
    session = Session(comm, RunDir(run_path), launcher_output())
    try:
        job = session.begin(lambda: config.load(job_path, overrides))
        outcome = session.end(train(job, session, allow_changed))
    except BaseException as error:
        return session.fail(error)
    if comm.rank == 0 and outcome.kind != "done" and not supervised():
        command = _next_command(outcome, comm, job_path, run_path, overrides)
        print(command, file=session.console, flush=True)
    comm.close()
    return exit_status(ExitStatus.STOPPED if outcome.kind == "stopped" else ExitStatus.OK)


def train(job: Job, session: Session, allow_changed: tuple[str, ...]) -> PhaseOutcome:
    """Build the trainer and train (a collective)."""
    comm, run, clock = session.comm, session.directory, session.clock
    with clock("start"):
        trainer = build_trainer(job, run, comm, clock, session.stop, session.console, allow_changed)
        if not supervised():
            write_job(job, run, comm)
        redirect_output(run, trainer.run.state.progress.phase, comm.rank)
    try:
        return trainer.train()
    except CollectiveError:
        trainer.run.wait_for_writes()
        raise


class Session:
    """What surrounds the training of one rank: locks, stop requests, heartbeats, failures.

    `begin` and then `end`, or `fail` for an error in between.
    """

    def __init__(self, comm: Communicator, directory: RunDir, console: TextIO) -> None:
        """
        Args:
            comm: all ranks.
            directory: of the run.
            console: for lines to the user, where standard output goes to a log file.
        """
        self.comm, self.directory, self.console = comm, directory, console
        self.clock, self.calls = Clock(), Calls(comm)
        self._locks = RunLock(directory), RunLock(directory, path=directory.ranks_lock)
        self._watchdog: Watchdog | None = None
        self._stop: StopRequest | None = None

    @property
    def stop(self) -> StopRequest:
        """Whether the run was asked to stop, from `begin` on."""
        assert self._stop
        return self._stop

    def begin(self, load: Callable[[], Job]) -> Job:
        """Lock the run directory and start to watch (a collective); returns the job from `load`.

        Raises:
            CollectiveError: the ranks or the job are not right, or the directory is in use.
        """
        comm, run = self.comm, self.directory
        raise_on_all_ranks(comm, lambda: _require_all_ranks(comm))
        job = raise_on_all_ranks(comm, load)
        raise_on_all_ranks(comm, lambda: _prepare(run, comm, *self._locks))
        self.clock.restart()
        self.clock.add("start", _seconds_since_start())
        self._watchdog = Watchdog(
            comm,
            comm.allgather_object(host()),
            self.clock,
            job.launch.heartbeat_timeout,
            job.launch.progress_timeout,
            _on_failure(run, comm, self.console),
            self.calls,
        )
        self._stop = StopRequest(comm, run.stop_request)
        return job

    def end(self, outcome: PhaseOutcome) -> PhaseOutcome:
        """Unlock, and watch no more (a collective); a stop may have been requested meanwhile."""
        outcome = _last_request(outcome, self.directory, self.comm, self.stop)
        self.close()
        return outcome

    def fail(self, error: BaseException) -> int:
        """End after an error: the exit status if all ranks have it, otherwise ends all of them."""
        if not isinstance(error, CollectiveError):
            _abort(error, self.directory, self.comm, self.console)
            raise AssertionError("abort does not return") from error
        if self._watchdog:
            self._watchdog.close()
        if self.comm.rank == 0:
            _report(error, self.directory, self.comm, self.console)
        self.comm.close()
        self.close()
        return exit_status(error.status)

    def close(self) -> None:
        """Unlock, and watch no more."""
        if self._watchdog:
            self._watchdog.close()
        if self._stop:
            self._stop.close()
        for lock in self._locks:
            lock.release()


def supervised() -> bool:
    """Whether `hpc-absa run` or `launch` has started this rank, and starts the next phase."""
    return SUPERVISED in os.environ


def _last_request(
    outcome: PhaseOutcome, run: RunDir, comm: Communicator, stop: StopRequest
) -> PhaseOutcome:
    """Turn a resize into a stop if one was requested meanwhile (a collective).

    All events are written by now, so from here on a signal ends this rank, which the launcher
    reports to the supervisor.
    """
    requested = any(comm.allgather_object(stop.requested_here()))
    stop.close()
    if not requested or outcome.kind != "resize":
        return outcome
    if comm.rank == 0:
        run.stop_request.touch()
    return replace(outcome, kind="stopped")


def _require_all_ranks(comm: Communicator) -> None:
    """Refuse to train as one of several MPI worlds that a launcher started in place of one."""
    requested = requested_ranks()
    if requested and requested[1] != comm.size:
        name, ranks = requested
        raise UsageError(
            f"{name} is {ranks}, but MPI_COMM_WORLD has size {comm.size}: the ranks have not "
            "connected; "
            "use the mpirun of the MPI that Horovod was built with, srun --mpi=pmix or pmi2, "
            f"or unset {name} if another launcher left it"
        )


def _prepare(run: RunDir, comm: Communicator, lock: RunLock, ranks_lock: RunLock) -> None:
    """Rank 0 sets up the run directory, unless a supervisor has done so."""
    if comm.rank != 0:
        return
    with _writing(run):
        run.create()
        run.joined.touch()
        if not supervised():
            lock.acquire()
            run.stop_request.unlink(missing_ok=True)
        ranks_lock.acquire(wait=supervised())


def write_job(job: Job, run: RunDir, comm: Communicator) -> None:
    """Rank 0 writes what it trains, once the checkpoints are known to be of it (a collective)."""

    def write() -> None:
        if comm.rank == 0:
            with _writing(run):
                run.write_job(config.dump(job))

    raise_on_all_ranks(comm, write)


@contextmanager
def _writing(run: RunDir) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunDirError(f"{run.path}: the run cannot be written there: {error}") from None


def _next_command(
    outcome: PhaseOutcome, comm: Communicator, job: Path, run: Path, overrides: tuple[str, ...]
) -> str:
    words = ["hpc-absa", "train", str(job), "--run-dir", str(run)]
    for override in overrides:
        words += ["--set", override]
    command = shlex.join(words)
    if outcome.kind == "stopped":
        return f"stopped, everything saved; to continue: mpirun -np {comm.size} {command}"
    return f"next phase: mpirun -np {outcome.next_ranks} {command}"


def exit_status(status: ExitStatus) -> int:
    """0 under a supervisor: a launcher would print messages about any other."""
    return int(ExitStatus.OK if supervised() else status)


# Errors


def _report(error: CollectiveError, run: RunDir, comm: Communicator, console: TextIO) -> None:
    """Pass a user's error to the supervisor, or print it if there is none."""
    if supervised():
        _write_failure(run, str(error), comm.rank, host(), error.status, final=True)
    elif launcher_rank() == 0:  # not once for each of many worlds of one rank
        print(f"hpc-absa: {error}", file=console, flush=True)


def _abort(error: BaseException, run: RunDir, comm: Communicator, console: TextIO) -> None:
    """Report an error of this rank, as the last thing that is printed, and end all ranks."""
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    reason = described(error)
    status = error.status if isinstance(error, MisuseError) else ExitStatus.FAILED
    _write_failure(run, reason, comm.rank, host(), status, final=isinstance(error, MisuseError))
    print(f"hpc-absa: rank {comm.rank} on {host()} failed: {reason}", file=console, flush=True)
    comm.abort(status)


def _on_failure(
    run: RunDir, comm: Communicator, console: TextIO
) -> Callable[[str, int, str, ExitStatus], None]:
    """What the watchdog calls: report, log what each thread of a hang does, and end all ranks."""

    def on_failure(reason: str, rank: int, where: str, status: ExitStatus) -> None:
        misuse = status == ExitStatus.USAGE
        _write_failure(run, reason, rank, where, status, final=misuse)
        if not misuse:
            faulthandler.dump_traceback(2)
            reason += ": all ranks are ended"
        print(f"hpc-absa: {reason}", file=console, flush=True)
        comm.abort(status)

    return on_failure


def _write_failure(
    run: RunDir, reason: str, rank: int, where: str, status: int, *, final: bool = False
) -> None:
    """Leave a file for the supervisor; that of the first rank to fail counts."""
    record = {
        "reason": reason,
        "rank": rank,
        "host": where,
        "exit_code": int(status),
        "final": final,
    }
    try:
        with run.failure.open("x", encoding="utf-8") as file:
            json.dump(record, file)
    except OSError:
        pass  # another rank was first, or the disk failed: the launcher's output remains


# Output


def launcher_output() -> TextIO:
    """The launcher's end of standard output, which remains when this rank's goes to its log."""
    return tolerant(os.dup(1), "utf-8" if supervised() else sys.stdout.encoding)


def redirect_output(run: RunDir, phase: int, rank: int) -> None:
    """Send this rank's standard output and error, also of native libraries, to its log file.

    By their descriptors: a script may have put objects of its own in place of `sys.stdout`.
    """
    log = run.rank_log(phase, rank)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        if isinstance(stream, io.TextIOWrapper) and stream.fileno() in (1, 2):
            stream.reconfigure(encoding="utf-8")


def _seconds_since_start() -> float:
    """Seconds since the process was started: interpreter, imports, MPI."""
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())
