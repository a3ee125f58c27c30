"""Horovod/MPI training whose batch and ranks grow as the loss surface becomes flatter."""

__version__ = "0.1.0"
