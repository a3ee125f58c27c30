"""Horovod/MPI training that starts small and grows where the loss surface has become flatter."""

__version__ = "0.1.0"
