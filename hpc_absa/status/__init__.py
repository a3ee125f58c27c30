"""Where a run stands. No torch and no HDF5 is imported, so that the answer comes in a blink."""

from hpc_absa.status.facts import Status, read_lock, status
from hpc_absa.status.picture import render

__all__ = ["Status", "read_lock", "render", "status"]
