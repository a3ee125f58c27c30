"""What can go wrong for a user, and the exit status each of it has (see the README's table)."""

from enum import IntEnum


class ExitStatus(IntEnum):
    """Exit statuses of every command."""

    OK = 0
    FAILED = 1
    USAGE = 2
    STOPPED = 75
    """Stopped on request, everything saved: the same command goes on from there (EX_TEMPFAIL)."""


class HpcAbsaError(Exception):
    """An error that a user can mend: its message is one line, shown without a traceback."""

    status = ExitStatus.FAILED


class UsageError(HpcAbsaError):
    """A bad job file, a wrong option, an input that does not fit."""

    status = ExitStatus.USAGE


class CheckpointError(HpcAbsaError):
    """A checkpoint that is damaged, unreadable, or belongs to another job."""


class RunDirError(HpcAbsaError):
    """A file of the run directory that cannot be written: a full disk, no permission."""


class RunLockedError(HpcAbsaError):
    """Another supervisor or world already works on this run directory."""


class CollectiveError(HpcAbsaError):
    """A user's error that all ranks have raised together, so that each may exit by itself."""

    def __init__(self, message: str, status: ExitStatus) -> None:
        """`message` is one line and `status` the exit status that all ranks end with."""
        super().__init__(message)
        self.status = status
