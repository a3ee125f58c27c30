"""A run directory: its names, its events, its lock, and how files in it are written."""

from hpc_absa.rundir.paths import CHECKPOINT_NAME, RunDir

__all__ = ["CHECKPOINT_NAME", "RunDir"]
