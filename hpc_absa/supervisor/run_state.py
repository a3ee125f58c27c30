"""Reads and changes a run between launches: its next ranks, its end, cancelling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpc_absa.config import Launchable
from hpc_absa.errors import UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event
from hpc_absa.rundir.lock import RunLock
from hpc_absa.supervisor.chain import Chain
from hpc_absa.supervisor.program import Program, read_program
from hpc_absa.supervisor.slurm import Slurm
from hpc_absa.worldsize import ranks_for

STARTED = ("RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT")
"""States of a job that may have something to save."""


def next_ranks(program: Program, run: RunDir, limit: int) -> int:
    """The number of ranks of the next phase, at most `limit`.

    The trainer decides it and writes it to the checkpoint, together with the limit that it knew.
    For another limit, and for checkpoints without these fields, it is computed from the saved
    global batch. The event log is not used: after damage to the newest checkpoint it describes
    steps that the next phase repeats.
    """
    saved = None
    if run.checkpoint_files():
        from hpc_absa.checkpoint import saved_phase  # h5py and numpy: not for the first launch

        saved = saved_phase(run.checkpoints)
    if saved is None:
        return program.initial_ranks(limit)
    if saved.next_ranks and saved.rank_limit == limit:  # the user may have raised the initial ones
        return max(saved.next_ranks, program.settings.ranks.initial)
    job = program.job(run)
    return ranks_for(job, saved.global_batch, min(limit, job.ranks.max or limit))


def finished(run: RunDir) -> Event | None:
    """The `done` event of a run that is over, and was not continued with more epochs."""
    last = run.log.last("done", "phase_start")
    return last if last and last["event"] == "done" else None


class RestartCounter:
    """Counts restarts since the last progress, which is a checkpoint of a later step."""

    def __init__(self, run: RunDir) -> None:
        self._run, self._best, self.count = run, _newest_step(run), 0

    def add(self) -> int:
        """Count one restart; returns the new count."""
        reached = _newest_step(self._run)
        self.count = 1 if reached > self._best else self.count + 1
        self._best = max(self._best, reached)
        return self.count


def _newest_step(run: RunDir) -> int:
    step = run.newest_step()
    return -1 if step is None else step


def clear(run: RunDir) -> None:
    """Remove a run's files to start from the beginning.

    Raises:
        UsageError: the folder is not a run directory.
        RunLockedError: a supervisor is running on it.
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


def default_run_dir(settings: Launchable) -> Path:
    """`runs/NAME` under the current folder."""
    return Path("runs") / settings.name


def cancel(path: Path, now: bool) -> Iterator[str]:
    """Ask the run in `path` to save and stop; yields what was done, one line each.

    Args:
        path: the run directory.
        now: end a running batch job at once, without waiting for it to save.

    Raises:
        UsageError: there is no run, or nothing to cancel.
    """
    run = RunDir(path)
    if not run.is_run:
        raise UsageError(f"{path}: not a run directory; name the folder given as --run-dir")
    if finished(run):
        raise UsageError(f"{path}: the run is done; there is nothing to cancel")
    run.stop_request.touch()
    asked = f"{path}: asked to save and stop (a running job sees it within a step)"
    if not run.chain.exists():
        yield asked
        return
    chain = Chain(run, read_program(run).settings.name)
    chain.cancel()
    try:
        slurm = Slurm()
    except UsageError:  # this host has no Slurm
        yield f"{asked}; a job that waits in the queue exits when it starts"
        return
    jobs = [job for job in slurm.jobs(chain.prefix) if job.alive]
    if not jobs:
        yield asked
    for job in jobs:
        if now or job.state not in STARTED:
            slurm.cancel(job.job_id)
            yield f"job {job.job_id} ({job.name}): cancelled while {job.state.lower()}"
        else:
            yield f"job {job.job_id} ({job.name}): asked to save and exit"
