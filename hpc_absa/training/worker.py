"""`hpc-absa train`: one rank's whole life, from joining the world to its exit status."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch

from hpc_absa import config, worldsize
from hpc_absa.comm import Communicator, connect, raise_on_all_ranks
from hpc_absa.config import Job
from hpc_absa.errors import CollectiveError, ExitStatus
from hpc_absa.records import PhaseOutcome
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event
from hpc_absa.rundir.lock import SUPERVISED, RunLock, host
from hpc_absa.training.assembly import assemble
from hpc_absa.training.clock import Clock
from hpc_absa.training.loop import Loop
from hpc_absa.training.narrator import Narrator
from hpc_absa.training.saving import Saver
from hpc_absa.training.stop import StopRequest
from hpc_absa.training.watchdog import Watchdog


def main(
    job_path: Path, run_path: Path, overrides: tuple[str, ...], allow_changed: tuple[str, ...]
) -> int:
    """Run one rank; returns the process's exit status, or ends the whole world on an error."""
    # Until this rank can listen, Ctrl-C ends it as other signals do, not as an error of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    comm = connect()
    gc.freeze()  # what the imports made stays
    gc.enable()
    people = _duplicate(sys.stdout)
    run = RunDir(run_path)
    lock = RunLock(run)
    watchdog: Watchdog | None = None
    try:
        job = raise_on_all_ranks(comm, lambda: config.load(job_path, overrides))
        raise_on_all_ranks(comm, lambda: _prepare(job, run, comm, lock))
        hosts = comm.allgather_object(host())
        clock, limits = Clock(), job.launch
        clock.add("start", _seconds_since_start())
        end = _giving_up(run, comm, people)
        watchdog = Watchdog(
            comm, hosts, clock, limits.heartbeat_timeout, limits.progress_timeout, end
        )
        stop = StopRequest(comm, run.stop_request)
        outcome = work(job, run, comm, clock, people, stop, allow_changed)
        outcome = _last_word(outcome, run, comm, stop)
        watchdog.close()
    except CollectiveError as error:
        if watchdog:
            watchdog.close()
        if comm.rank == 0:
            _tell_agreed(error, run, comm, people)
        comm.close()
        return _status(error.status)
    except BaseException as error:
        _die(error, run, comm, people)
        raise AssertionError("abort does not return") from error
    finally:
        lock.release()
    if comm.rank == 0 and outcome.kind != "done" and SUPERVISED not in os.environ:
        print(_next_command(outcome, comm, job_path, run_path, overrides), file=people, flush=True)
    comm.close()
    return _status(ExitStatus.STOPPED if outcome.kind == "stopped" else ExitStatus.OK)


def work(
    job: Job,
    run: RunDir,
    comm: Communicator,
    clock: Clock,
    people: TextIO,
    stop: StopRequest,
    allow_changed: tuple[str, ...],
) -> PhaseOutcome:
    """Assemble and train; the body of a rank once its world stands (a collective)."""
    with clock("start"):
        parts, live, progress, origin = assemble(job, run, comm, clock, allow_changed)
        if parts.device.type == "cuda":
            clock.settle = torch.cuda.synchronize
        _redirect_output(run, progress.phase, comm.rank)
    narrator = Narrator(run, comm.rank, people)
    saver = Saver(
        parts.store,
        comm,
        background=job.checkpoint.background,
        shard_bytes=job.checkpoint.shard_bytes,
        on_error=job.checkpoint.on_error,
        warn=narrator.save_failed,
    )
    loop = Loop(
        parts,
        live,
        progress,
        origin,
        comm,
        run,
        narrator,
        stop,
        saver,
        worldsize.limit(job),
        _resized_from(run),
    )
    try:
        return loop.run()
    except CollectiveError:
        saver.wait()
        raise


def _last_word(
    outcome: PhaseOutcome, run: RunDir, comm: Communicator, stop: StopRequest
) -> PhaseOutcome:
    """Where a world that makes room for a larger one is asked to stop, none comes (a collective).

    On return everybody's last event is written, and a signal ends this rank, as it would a program
    that knows of none: the launcher tells the supervisor.
    """
    asked = any(comm.allgather_object(stop.here()))
    stop.close()
    if not asked or outcome.kind != "resize":
        return outcome
    if comm.rank == 0:
        run.stop_request.touch()
    return replace(outcome, kind="stopped")


def _prepare(job: Job, run: RunDir, comm: Communicator, lock: RunLock) -> None:
    """Rank 0 makes the run directory its own; a supervised world's supervisor has done so."""
    if comm.rank != 0:
        return
    run.create()
    run.joined.touch()
    if SUPERVISED not in os.environ:
        lock.acquire()
        run.stop_request.unlink(missing_ok=True)
        run.write_job(config.dump(job))


def _resized_from(run: RunDir) -> Event | None:
    """The last event, where it is the end of a phase whose decision asked for this world."""
    last = [e for e in run.log.read() if e["event"] in ("phase_end", "failure")][-1:]
    if last and last[0]["event"] == "phase_end" and last[0].get("outcome") == "resize":
        return last[0]
    return None


def _next_command(
    outcome: PhaseOutcome, comm: Communicator, job: Path, run: Path, overrides: tuple[str, ...]
) -> str:
    words = ["hpc-absa", "train", str(job), "--run-dir", str(run)]
    for override in overrides:
        words += ["--set", override]
    command = shlex.join(words)
    if outcome.kind == "stopped":
        return f"stopped, everything saved; to go on: mpirun -np {comm.size} {command}"
    return f"next phase: mpirun -np {outcome.next_ranks} {command}"


def _status(status: ExitStatus) -> int:
    """What a rank exits with: 0 under a supervisor, which needs no noise of the launcher's."""
    return int(ExitStatus.OK if SUPERVISED in os.environ else status)


def _tell_agreed(error: CollectiveError, run: RunDir, comm: Communicator, people: TextIO) -> None:
    """Say what the user can mend: to the supervisor, or where there is none to the user."""
    if SUPERVISED in os.environ:
        _leave_failure(run, comm, str(error), error.status, final=True)
    else:
        print(f"hpc-absa: {error}", file=people, flush=True)


def _die(error: BaseException, run: RunDir, comm: Communicator, people: TextIO) -> None:
    """This rank's error as the last thing that people read, then the end of the world."""
    traceback.print_exception(error, file=sys.stderr)
    sys.stderr.flush()
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    _leave_failure(run, comm, reason, ExitStatus.FAILED)
    print(f"hpc-absa: rank {comm.rank} on {host()} failed: {reason}", file=people, flush=True)
    comm.abort(ExitStatus.FAILED)


def _giving_up(run: RunDir, comm: Communicator, people: TextIO) -> Callable[[str, int, str], None]:
    """What the watchdog calls: leave word, and end the world; what each thread does is logged."""

    def give_up(reason: str, rank: int, where: str) -> None:
        faulthandler.dump_traceback()
        _leave_failure(run, comm, reason, ExitStatus.FAILED, blame=(rank, where))
        print(f"hpc-absa: {reason}: the world is ended", file=people, flush=True)
        comm.abort(ExitStatus.FAILED)

    return give_up


def _leave_failure(
    run: RunDir,
    comm: Communicator,
    reason: str,
    status: int,
    *,
    final: bool = False,
    blame: tuple[int, str] | None = None,
) -> None:
    """Leave word for the supervisor; the first rank to fail is the one that counts."""
    rank, where = blame or (comm.rank, host())
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
        pass  # another rank was first, or the disk is what failed: the launcher's output tells


def _duplicate(stream: TextIO) -> TextIO:
    """The launcher's end of `stream`, which stays when the rank's own output goes to its log."""
    return os.fdopen(os.dup(stream.fileno()), "w", buffering=1, encoding="utf-8")


def _redirect_output(run: RunDir, phase: int, rank: int) -> None:
    """Send this rank's standard output and error, native libraries' too, to its log."""
    log = run.rank_log(phase, rank)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)


def _seconds_since_start() -> float:
    """Seconds since the process was started: interpreter, imports, MPI."""
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())
