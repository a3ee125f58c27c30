"""The first block of a checkpoint file: a checksum of every chunk after it.

It is verified before libhdf5 sees the file, which trusts the bytes it is given: of 14,000 single
flipped bits (HDF5 2.0.0) six made it loop for ever. HDF5 calls such a block a user block; its
readers (h5py, h5ls, ...) skip it.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
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


def read_verified(path: Path) -> np.ndarray:
    """The bytes of a checkpoint file, uint8, every one as it was written.

    Raises:
        NotACheckpointError: there is no such file, or it does not begin as a checkpoint.
        CheckpointError: it is damaged, or cannot be read.
    """
    try:
        if not path.exists():
            raise NotACheckpointError(f"{path}: no such file")
        if not path.is_file():
            raise NotACheckpointError(f"{path}: not a file")
        with path.open("rb") as file:
            return _read(path, file.fileno())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None


def read_chunk(descriptor: int, start: int, into: memoryview) -> memoryview:
    """The bytes from `start` on, in the first bytes of `into`; fewer at the end of the file."""
    filled = 0
    while filled < len(into) and (count := os.preadv(descriptor, [into[filled:]], start + filled)):
        filled += count
    return into[:filled]


def _read(path: Path, descriptor: int) -> np.ndarray:
    """The whole file, compared with its first block."""
    start, size = os.pread(descriptor, SMALLEST_BLOCK, 0), os.fstat(descriptor).st_size
    if start.startswith(HDF5_MAGIC):
        raise NotACheckpointError(f"{path}: an HDF5 file, but not a checkpoint of hpc-absa")
    if not start.startswith(MAGIC) and path.suffix != ".h5":
        raise NotACheckpointError(f"{path}: not a checkpoint")
    if not start.startswith(MAGIC):
        raise _damaged(path, "it does not begin as a checkpoint")
    head = _HEAD.match(start)
    if head and int(head[2]) != size:
        raise _damaged(path, f"it has {size} bytes, not the {int(head[2])} written")
    block = int(head[1]) if head else 0
    if not SMALLEST_BLOCK <= block <= min(size, LARGEST_BLOCK):
        raise _damaged(path, "its first block is not as written")
    file = np.empty(size, np.uint8)
    first = bytes(read_chunk(descriptor, 0, file[:block].data))
    lines = first.rstrip(b"\0").split(b"\n")
    wanted = lines[4].split() if len(lines) > 4 else []
    checksums = []
    for number, at in enumerate(range(block, size, CHUNK)):
        chunk = read_chunk(descriptor, at, file[at : at + CHUNK].data)
        checksums.append(crc32(chunk))
        if number < len(wanted) and wanted[number] != b"%08x" % checksums[-1]:
            last = at + len(chunk) - 1
            raise _damaged(path, f"bytes {at} to {last} of {size} do not match their checksum")
    if first != first_block(block, size, checksums):
        what = f"its first {block} bytes, or its length of {size}, are not as written"
        raise _damaged(path, what)
    return file


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged: {what}")
