"""All checks, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hpc_absa.config import Job
from hpc_absa.doctor.cluster import check_cluster
from hpc_absa.doctor.directory import check_directory
from hpc_absa.doctor.finding import Finding
from hpc_absa.doctor.software import check_software
from hpc_absa.doctor.surroundings import check_surroundings
from hpc_absa.rundir import RunDir


@dataclass(frozen=True)
class Patient:
    """What is examined."""

    run: RunDir
    """The run directory, there or to be made."""
    job: Job | None = None
    """What is to run; None examines the installation alone."""


def examine(patient: Patient) -> Iterator[Finding]:
    """Every finding, as soon as it is made."""
    yield from check_surroundings(patient.job)
    yield from check_directory(patient.run)
    yield from check_cluster(patient.job)
    yield from check_software(patient.job)
