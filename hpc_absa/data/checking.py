"""Reading image files and checking that they can be decoded: in threads, on one rank or on many.

Rank 0 packs, with the files from `read_all`; the other ranks read for it until it ends
(`on_rank_0`).
"""

from __future__ import annotations

import errno
import hashlib
import socket
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from hpc_absa.data.encoded import cores, decode
from hpc_absa.data.sources import decoded
from hpc_absa.errors import CollectiveError, HpcAbsaError, UsageError, first_line

if TYPE_CHECKING:
    from hpc_absa.comm import Communicator

T = TypeVar("T")
OF_THE_FILE = (errno.ENOENT, errno.ELOOP, errno.EIO, errno.EACCES, errno.EPERM)
"""Errors that make a file unreadable; others, such as too many open files, are the machine's."""

Listed = tuple[str, int]
"""A file and its size in bytes when it was listed."""


class Checked(NamedTuple):
    """A file that was read."""

    data: bytes = b""
    width: int = 0
    height: int = 0
    digest: str = ""
    remarks: tuple[str, ...] = ()
    """What the conversion to RGB leaves out."""
    problem: str = ""
    """Why it cannot be read as an image."""


def read_all(comm: Communicator, blocks: Iterable[Sequence[Listed]]) -> Generator[list[Checked]]:
    """The files of each block, in order, on rank 0; block k is read by rank k mod their number.

    Raises:
        UsageError: a file that is gone, or has another size than when it was listed.
    """
    left = iter(blocks)
    rounds = iter(lambda: list(islice(left, comm.size)), [])
    pending: list[Future[Checked]] = []
    with closing(_Pool()) as pool:
        for shares in chain(rounds, [[]]):
            comm.broadcast_object(shares)
            following = pool.submit(shares, comm.rank)  # while the ones before are written
            with closing(comm.gather_object(_results(pending))) as gathered:
                for files in gathered:
                    if isinstance(files, str):
                        raise UsageError(files)
                    if files:
                        yield files
            pending = following


def on_rank_0(comm: Communicator, action: Callable[[], T]) -> T | None:
    """The value of `action()`, which may use `read_all`; None on other ranks (a collective).

    Raises:
        CollectiveError: on all ranks, the error of `action`.
    """
    if comm.rank:
        _read_for_rank_0(comm)
        return None
    try:
        value = action()
    except HpcAbsaError as error:
        comm.broadcast_object((str(error), error.status))
        raise CollectiveError(str(error), error.status) from error
    comm.broadcast_object(None)
    return value


def _read_for_rank_0(comm: Communicator) -> None:
    pending: list[Future[Checked]] = []
    with closing(_Pool()) as pool:
        while (shares := comm.broadcast_object(None)) is not None:
            if isinstance(shares, tuple):
                raise CollectiveError(*shares)
            following = pool.submit(shares, comm.rank)
            list(comm.gather_object(_results(pending)))
            pending = following


class _Pool:
    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(cores(), thread_name_prefix="pack")

    def submit(self, shares: Sequence[Sequence[Listed]], rank: int) -> list[Future[Checked]]:
        """Read the share of this rank, if there is one."""
        files = shares[rank] if rank < len(shares) else ()
        return [self._threads.submit(_check, *file) for file in files]

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)


def _results(pending: Sequence[Future[Checked]]) -> list[Checked] | str:
    try:
        return [future.result() for future in pending]
    except UsageError as error:
        return str(error)


def _check(path: str, size: int) -> Checked:
    title = decoded(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        if size and isinstance(error, FileNotFoundError):
            raise UsageError(
                f"{title}: gone since the files were listed, or not on {socket.gethostname()}; all "
                "ranks must see the folder"
            ) from error
        if error.errno not in OF_THE_FILE:
            raise UsageError(f"{title}: {error.strerror}, on {socket.gethostname()}") from error
        return Checked(problem=f"{title}: unreadable file ({error.strerror})")
    if len(data) != size:
        raise UsageError(
            f"{title}: has {len(data)} bytes, and had {size} when the files were listed; pack "
            "again when nothing writes to the folder"
        )
    remarks: list[str] = []
    try:
        width, height = decode(data, title, remarks=remarks).size
    except HpcAbsaError as error:
        return Checked(problem=first_line(error))
    digest = hashlib.blake2b(data, digest_size=16).hexdigest()
    return Checked(data, width, height, digest, tuple(remarks))
