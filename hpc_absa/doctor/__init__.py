"""`hpc-absa doctor`: what an installation can do, what is wrong with it, and how to mend it."""

from hpc_absa.doctor.examination import Patient, examine
from hpc_absa.doctor.finding import Finding

__all__ = ["Finding", "Patient", "examine"]
