"""Checkpoints in HDF5: written whole or not at all, verified before they are trusted."""

from hpc_absa.checkpoint.file import read, verify, write
from hpc_absa.checkpoint.schema import Content, Group
from hpc_absa.checkpoint.store import Store

__all__ = ["Content", "Group", "Store", "read", "verify", "write"]
