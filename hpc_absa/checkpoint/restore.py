"""Reading a checkpoint on all ranks: each byte from the file system once, then over MPI.

The ranks that see the file read and verify one chunk each at a time, broadcast them in turn, and
copy what they receive to where it belongs while it is in the processor's cache.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from hpc_absa.checkpoint import file, integrity
from hpc_absa.checkpoint.format import Content, Key, Outline, Place
from hpc_absa.checkpoint.integrity import VerifiedFile
from hpc_absa.checkpoint.manager import CheckpointManager
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.errors import CollectiveError, ExitStatus, HpcAbsaError
from hpc_absa.rundir.paths import checkpoint_files

PREFETCH = 16
"""Chunks of each rank that the system reads in the background."""


@dataclass(frozen=True)
class Header:
    """A checkpoint without its arrays' bytes; the same on all ranks."""

    path: Path
    scalars: Content
    places: Mapping[Key, Place]
    """Types and shapes of all arrays."""


Accept = Callable[[Header], Mapping[Key, Tensor]]
"""Called on all ranks before arrays are read.

Raises an HpcAbsaError to refuse the checkpoint, and returns tensors that arrays are read into:
contiguous, on the CPU, with the shape and type of the array. Their values are undefined if the
checkpoint turns out to be damaged.
"""


class RefusedError(CollectiveError):
    """A checkpoint that `Accept` refused."""


@dataclass(frozen=True)
class Restored:
    """The checkpoint that a run continues from; the same on all ranks."""

    path: Path
    content: Content
    damaged: tuple[str, ...]
    """What is wrong with newer ones."""


def accept_any(header: Header) -> Mapping[Key, Tensor]:
    """Into new memory."""
    return {}


def newest_good(
    manager: CheckpointManager, comm: Communicator, accept: Accept = accept_any
) -> Restored | None:
    """The newest checkpoint that verifies, None if there is none at all (a collective).

    Raises:
        RefusedError: `accept` refused it, on any rank.
        CollectiveError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[str] = []
    for path in reversed(comm.broadcast_object(checkpoint_files(manager.folder))):
        try:
            return Restored(path, load(path, comm, accept), tuple(damaged))
        except RefusedError:
            raise
        except CollectiveError as error:
            damaged.append(str(error))
            manager.mark_damaged(path)
    if damaged:
        raise CollectiveError(
            f"{manager.folder}: no checkpoint is good; remove the folder to start again: "
            + "; ".join(damaged),
            ExitStatus.FAILED,
        )
    return None


def load(path: Path, comm: Communicator, accept: Accept = accept_any) -> Content:
    """One checkpoint, verified; the ranks that can read it share the reading.

    Raises:
        RefusedError: as `newest_good`.
        CollectiveError: on all ranks, if it is damaged or not a checkpoint.
    """
    with ExitStack() as files:
        reading = _Reading(path, comm, files)
        try:
            memory = raise_on_all_ranks(comm, lambda: accept(reading.header))
        except CollectiveError as refused:
            raise RefusedError(str(refused), refused.status) from None
        return reading.content(memory)


@dataclass(frozen=True)
class _Part:
    """One of the checkpoint's files."""

    path: Path
    outline: Outline
    block: int
    size: int
    reader: int
    """The rank that read the outline."""
    kept: frozenset[int]
    """Chunks that it has in memory."""

    def span(self, chunk: int) -> tuple[int, int]:
        """Offset and length of a chunk."""
        start = self.block + chunk * integrity.CHUNK
        return start, min(integrity.CHUNK, self.size - start)


class _Reading:
    """A checkpoint that all ranks read; all methods are collectives."""

    def __init__(self, path: Path, comm: Communicator, files: ExitStack) -> None:
        """Raises a CollectiveError."""
        self._comm, self._files = comm, files
        self._opened = dict[Path, VerifiedFile]()
        raise_on_all_ranks(comm, lambda: self._open(path) if comm.rank == 0 else None)
        firsts = comm.allgather_object(self._first(path))
        self._readers = [rank for rank, first in enumerate(firsts) if first == firsts[0]]
        if comm.rank in self._readers:  # while one of them reads the outline
            opened, position = self._open(path), self._readers.index(comm.rank)
            first = -(-opened.chunks * position // len(self._readers))
            for number in range(first, first + PREFETCH):
                opened.prefetch(number)
        (main,) = self._describe({path: None})
        shards = {path.with_name(name): digest for name, digest in main.outline.shards.items()}
        self._parts = [main, *self._describe(shards)]
        places = {key: place for p in self._parts for key, place in p.outline.places.items()}
        self.header = Header(path, main.outline.scalars, places)

    def content(self, memory: Mapping[Key, Tensor]) -> Content:
        """The whole checkpoint; raises a CollectiveError."""
        comm, queues = self._comm, self._queues()
        arrays = {
            key: as_array(memory[key]) if key in memory else np.empty(place.shape, place.dtype)
            for key, place in self.header.places.items()
        }
        pieces = {}
        for part in self._parts:
            here = {key: arrays[key] for key in part.outline.places}
            pieces[part.path] = file.in_file(here, part.outline.places)
        mine = queues[comm.rank]
        own, received = (np.empty(integrity.CHUNK + 1, np.uint8) for _ in range(2))
        for ahead in range(PREFETCH):
            self._prefetch(mine, ahead)
        for index, chunks in enumerate(itertools.zip_longest(*queues)):
            error = self._read(*mine[index], own) if index < len(mine) else None
            self._prefetch(mine, index + PREFETCH)
            for rank, (part, number) in ((r, chunk) for r, chunk in enumerate(chunks) if chunk):
                buffer = own if rank == comm.rank else received
                start, length = part.span(number)
                comm.broadcast_(torch.from_numpy(buffer[: length + 1]), rank)
                if not buffer[length]:
                    self._fail(error)
                file.fill(pieces[part.path], start, buffer[:length].data)
        return self.header.scalars.with_arrays(arrays)

    def _open(self, path: Path) -> VerifiedFile:
        if path not in self._opened:
            self._opened[path] = self._files.enter_context(VerifiedFile(path))
        return self._opened[path]

    def _first(self, path: Path) -> int | None:
        """A hash of the file's first block; None where this rank cannot read it."""
        with suppress(HpcAbsaError):
            return xxh3_64_intdigest(self._open(path).first)
        return None

    def _describe(self, files: Mapping[Path, str | None]) -> list[_Part]:
        """Each by one of the ranks."""
        comm, readers = self._comm, self._readers

        def describe() -> dict[Path, _Part]:
            return {
                path: self._part(path, digest)
                for index, (path, digest) in enumerate(files.items())
                if readers[index % len(readers)] == comm.rank
            }

        parts = comm.allgather_object(raise_on_all_ranks(comm, describe)) if files else []
        return [parts[readers[i % len(readers)]][path] for i, path in enumerate(files)]

    def _part(self, path: Path, digest: str | None) -> _Part:
        if digest and not path.exists():
            raise file.missing(path)
        opened = self._open(path)
        outline = file.describe(opened, digest)
        kept = frozenset(opened.kept)
        return _Part(path, outline, len(opened.first), opened.size, self._comm.rank, kept)

    def _queues(self) -> list[list[tuple[_Part, int]]]:
        """The chunks that each rank reads: a part of the file, and those that it has already."""
        chunks = [
            (part, number)
            for part in self._parts
            for number in range(-(-(part.size - part.block) // integrity.CHUNK))
        ]
        queues: list[list[tuple[_Part, int]]] = [[] for _ in range(self._comm.size)]
        for index, (part, number) in enumerate(chunks):
            reader = self._readers[index * len(self._readers) // len(chunks)]
            queues[part.reader if number in part.kept else reader].append((part, number))
        return queues

    def _read(self, part: _Part, number: int, into: np.ndarray) -> HpcAbsaError | None:
        """A chunk, and after it a byte that says whether it is good."""
        _, length = part.span(number)
        try:
            self._open(part.path).read_chunk(number, into[:length].data)
        except HpcAbsaError as error:
            into[length] = 0
            return error
        into[length] = 1
        return None

    def _fail(self, error: HpcAbsaError | None) -> None:
        """Raise it on all ranks; None on those that read no bad chunk."""

        def fail() -> None:
            if error:
                raise error

        raise_on_all_ranks(self._comm, fail)

    def _prefetch(self, chunks: list[tuple[_Part, int]], index: int) -> None:
        if index < len(chunks):
            part, number = chunks[index]
            with suppress(HpcAbsaError):  # which reading it will report
                self._open(part.path).prefetch(number)


def as_array(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor on the CPU as an array; bfloat16 as its bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
