"""Errors that are shown without a traceback, and the exit status of each (see README)."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit statuses of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    STOPPED = 75
    """Stopped on request with everything saved; the same command continues (EX_TEMPFAIL)."""


class HpcAbsaError(Exception):
    """An error that a user can fix: its message is one line, shown without a traceback."""

    status = ExitStatus.FAILED


class UsageError(HpcAbsaError):
    """A bad job file, a wrong option, an input that does not fit."""

    status = ExitStatus.USAGE


class MisuseError(UsageError):
    """A script that uses `hpc_absa.Run` in another way than it must, or a user-defined rule that
    fails; the same on all ranks.
    """


class CheckpointError(HpcAbsaError):
    """A checkpoint that is damaged, unreadable, or belongs to another job."""


class RunDirError(HpcAbsaError):
    """A file of the run directory that cannot be written: a full disk, no permission."""


class RunLockedError(HpcAbsaError):
    """Another supervisor or training process uses this run directory."""


def first_line(error: BaseException) -> str:
    """Of its message, without the trace that HDF5 adds; its type if there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class CollectiveError(HpcAbsaError):
    """A user's error that all ranks raise together, so that each can exit by itself."""

    def __init__(self, message: str, status: ExitStatus) -> None:
        """`message` is one line and `status` the exit status that all ranks end with."""
        super().__init__(message)
        self.status = status
