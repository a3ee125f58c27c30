"""Checkpoints in HDF5: written whole or not at all, verified before they are trusted."""

from hpc_absa.checkpoint.file import read, write
from hpc_absa.checkpoint.layout import Shard
from hpc_absa.checkpoint.schema import Content, Group, Key
from hpc_absa.checkpoint.store import Published, SavedPhase, Store, saved_phase

__all__ = [
    "Content",
    "Group",
    "Key",
    "Published",
    "SavedPhase",
    "Shard",
    "Store",
    "read",
    "saved_phase",
    "write",
]
