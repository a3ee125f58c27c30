"""`hpc-absa doctor`: checks what an installation and a machine need to run a job."""

from __future__ import annotations

from collections.abc import Iterator

from hpc_absa.config import Job
from hpc_absa.doctor.machine import Finding, check_cluster, check_machine, check_run_dir
from hpc_absa.doctor.software import check_rehearsal, check_software
from hpc_absa.rundir import RunDir

__all__ = ["Finding", "run_checks"]


def run_checks(run: RunDir, job: Job | None = None) -> Iterator[Finding]:
    """Yield each finding as soon as its check ends.

    Args:
        run: the run directory; it need not exist.
        job: the job that is to run; None checks the installation only.
    """
    yield from check_machine(job)
    yield from check_run_dir(run)
    yield from check_cluster(job)
    yield from check_software()
    if job is not None:
        yield check_rehearsal(job)
