"""The first block of a checkpoint file: a checksum of every chunk after it.

It is verified before libhdf5 sees the file, which trusts the bytes it is given: of 14,000 single
flipped bits (HDF5 2.0.0) six made it loop for ever. HDF5 calls such a block a user block; its
readers (h5py, h5ls, ...) skip it.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32

from hpc_absa.errors import CheckpointError

MAGIC = b"hpc-absa checkpoint\n"
HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"
CHUNK = 1 << 22
"""Bytes with one checksum, counted from the end of the block."""
SMALLEST_BLOCK = 512
"""Bytes of HDF5's smallest user block; larger ones are this times a power of two."""
LARGEST_BLOCK = 1 << 26
"""Bytes: the checksums of 28 TiB."""

_HEAD = re.compile(MAGIC + rb"block (\d+)\nbytes (\d+)\n")


class NotACheckpointError(CheckpointError):
    """The path is neither a good nor a damaged checkpoint of hpc-absa."""


def block_size(content: int) -> int:
    """Bytes to leave free at the beginning of a file with about `content` further bytes."""
    needed = 128 + 9 * (content // CHUNK + 8)
    return max(SMALLEST_BLOCK, 1 << (needed - 1).bit_length())


def first_block(block: int, size: int, checksums: list[int]) -> bytes:
    """The first `block` bytes of a file of `size`, with the CRC-32 of each chunk after them."""
    text = f"block {block}\nbytes {size}\ncrc32 of each {CHUNK}\n"
    text += " ".join(f"{checksum:08x}" for checksum in checksums) + "\n"
    return (MAGIC + text.encode()).ljust(block, b"\0")


class VerifiedFile(io.RawIOBase):
    """A checkpoint file that gives out no byte without having compared its chunk's checksum.

    HDF5 can read it like any file object; the chunks that it needs are kept in memory.
    """

    def __init__(self, path: Path) -> None:
        """
        Raises:
            NotACheckpointError: there is no such file, or it does not begin as a checkpoint.
            CheckpointError: its first block is damaged, or it cannot be read.
        """
        self.path, self.kept = path, dict[int, memoryview]()
        self.error: str | None = None
        """Why HDF5 was refused a chunk."""
        self._at, self._descriptor = 0, -1
        with self._readable():
            if not path.exists():
                raise NotACheckpointError(f"{path}: no such file")
            if not path.is_file():
                raise NotACheckpointError(f"{path}: not a file")
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._descriptor).st_size
            self.first, self._checksums = self._first_block()

    @property
    def chunks(self) -> int:
        """How many there are."""
        return len(self._checksums)

    def start(self, number: int) -> int:
        """The offset of a chunk in the file."""
        return len(self.first) + number * CHUNK

    def buffer(self) -> memoryview:
        """Memory for a chunk."""
        return memoryview(bytearray(min(CHUNK, self.size - len(self.first))))

    def read_chunk(self, number: int, into: memoryview) -> memoryview:
        """A chunk, in the first bytes of `into`; one that was kept is released.

        Raises:
            CheckpointError: it is damaged, or cannot be read.
        """
        if (kept := self.kept.pop(number, None)) is not None:
            into[: len(kept)] = kept
            return into[: len(kept)]
        start = self.start(number)
        with self._readable():
            data = read_chunk(self._descriptor, start, into[: min(CHUNK, self.size - start)])
        if crc32(data) != self._checksums[number]:
            last = start + len(data) - 1
            raise self._damaged(
                f"bytes {start} to {last} of {self.size} do not match their checksum"
            )
        return data

    def prefetch(self, number: int) -> None:
        """Have the system read a chunk in the background; nothing where there is no such one."""
        if number < self.chunks and number not in self.kept:
            with suppress(OSError):
                advice = os.POSIX_FADV_WILLNEED
                os.posix_fadvise(self._descriptor, self.start(number), CHUNK, advice)

    def keep_chunk(self, number: int) -> memoryview:
        """A chunk, which `read_chunk` will not read again."""
        if number not in self.kept:
            self.kept[number] = self.read_chunk(number, self.buffer())
        return self.kept[number]

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        into = memoryview(buffer).cast("B")
        filled, block = 0, len(self.first)
        while filled < len(into) and self._at < self.size:
            if self._at < block:
                data = memoryview(self.first)[self._at :]
            else:
                number, offset = divmod(self._at - block, CHUNK)
                try:
                    data = self.keep_chunk(number)[offset:]
                except CheckpointError as error:
                    self.error = str(error)
                    raise
            data = data[: len(into) - filled]
            into[filled : filled + len(data)] = data
            filled, self._at = filled + len(data), self._at + len(data)
        return filled

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self.kept.clear()
        super().close()

    def _first_block(self) -> tuple[bytes, list[int]]:
        """The first block, which must be as written, and the checksums in it."""
        start, size = os.pread(self._descriptor, SMALLEST_BLOCK, 0), self.size
        if start.startswith(HDF5_MAGIC):
            raise NotACheckpointError(
                f"{self.path}: an HDF5 file, but not a checkpoint of hpc-absa"
            )
        if not start.startswith(MAGIC) and self.path.suffix != ".h5":
            raise NotACheckpointError(f"{self.path}: not a checkpoint")
        if not start.startswith(MAGIC):
            raise self._damaged("it does not begin as a checkpoint")
        head = _HEAD.match(start)
        if head and int(head[2]) != size:
            raise self._damaged(f"it has {size} bytes, not the {int(head[2])} written")
        block = int(head[1]) if head else 0
        if SMALLEST_BLOCK <= block <= min(size, LARGEST_BLOCK):
            first = bytes(read_chunk(self._descriptor, 0, memoryview(bytearray(block))))
            with suppress(ValueError, IndexError):
                checksums = [int(word, 16) for word in first.split(b"\n")[4].split()]
                complete = len(checksums) == -(-(size - block) // CHUNK)
                if complete and first == first_block(block, size, checksums):
                    return first, checksums
        raise self._damaged("its first block is not as written")

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            what = error.strerror or error
            raise CheckpointError(f"{self.path}: cannot be read: {what}") from None

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: damaged: {what}")


def read_chunk(descriptor: int, start: int, into: memoryview) -> memoryview:
    """The bytes from `start` on, in the first bytes of `into`; fewer at the end of the file."""
    filled = 0
    while filled < len(into) and (count := os.preadv(descriptor, [into[filled:]], start + filled)):
        filled += count
    return into[:filled]
