"""Agree, then act: an error that every rank learns of before any rank leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from hpc_absa.comm import Communicator
from hpc_absa.errors import ExitStatus, HpcAbsaError

T = TypeVar("T")


class AgreedError(HpcAbsaError):
    """A user's error that all ranks have raised together, so that each may exit by itself."""

    def __init__(self, message: str, status: ExitStatus) -> None:
        """`message` is one line and `status` the exit status all ranks end with."""
        super().__init__(message)
        self.status = status


def agreed(comm: Communicator, action: Callable[[], T]) -> T:
    """The value of `action` on this rank, or on every rank the first rank's error (a collective).

    `action` itself must not enter a collective.

    Raises:
        AgreedError: on all ranks, where `action` raised an `HpcAbsaError` on any.
    """
    error: tuple[str, ExitStatus] | None = None
    try:
        value = action()
    except HpcAbsaError as raised:
        error = (str(raised), raised.status)
    first = next((e for e in comm.gather_objects(error) if e), None)
    if first:
        raise AgreedError(*first)
    return value
