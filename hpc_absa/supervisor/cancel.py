"""`hpc-absa cancel D`: a run saves and stops, wherever its processes are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpc_absa import config
from hpc_absa.errors import UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.supervisor import driver
from hpc_absa.supervisor.chain import Chain
from hpc_absa.supervisor.slurm import Slurm


def cancel(path: Path, now: bool) -> Iterator[str]:
    """Ask the run in `path` to save and stop; yields what was done, for people.

    Args:
        path: the run directory.
        now: end a chain's running job as well, without waiting for it to save.

    Raises:
        UsageError: there is no run, or nothing to cancel.
    """
    run = RunDir(path)
    if not run.job.exists():
        raise UsageError(f"{path}: not a run directory (no job.toml)")
    if driver.finished(run):
        raise UsageError(f"{path}: the run is done; there is nothing to cancel")
    run.stop_request.touch()
    if not run.chain.exists():
        yield f"{path}: asked to save and stop (a run at work sees it within a step)"
        return
    chain = Chain(run, config.load(run.job, warn=False).name)
    chain.cancel()
    slurm = Slurm()
    for job in (job for job in slurm.jobs(chain.prefix) if job.alive):
        waits = job.state not in ("RUNNING", "COMPLETING")
        if waits or now:
            slurm.cancel(job.job_id)
            yield f"job {job.job_id} ({job.name}): cancelled while {job.state.lower()}"
        else:
            yield f"job {job.job_id} ({job.name}): asked to save and end"
