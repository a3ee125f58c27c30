"""Checkpoints in HDF5: written completely or not at all, verified before they are used."""

from hpc_absa.checkpoint.file import read, write
from hpc_absa.checkpoint.format import Content, Group, Key, Scalar, Written
from hpc_absa.checkpoint.manager import CheckpointManager, Published, SavedPhase, saved_phase

__all__ = [
    "CheckpointManager",
    "Content",
    "Group",
    "Key",
    "Published",
    "SavedPhase",
    "Scalar",
    "Written",
    "read",
    "saved_phase",
    "write",
]
