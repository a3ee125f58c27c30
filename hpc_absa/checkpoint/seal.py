"""A checkpoint file's first block: a checksum of every chunk after it, checked before HDF5 looks.

libhdf5 trusts the bytes it is given. Of 14,000 single flipped bits (HDF5 2.0.0) six made it loop
for ever; so damaged bytes must not reach it at all. HDF5 calls such a first block a user block: its
readers (h5py, h5ls, ...) pass over it.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

MAGIC = b"hpc-absa checkpoint\n"
HDF5 = b"\x89HDF\r\n\x1a\n"
CHUNK = 1 << 22
"""Bytes under one checksum, counted from the end of the block."""
SMALLEST = 512
"""Bytes of the smallest user block that HDF5 allows; others are this times a power of two."""
LARGEST = 1 << 26
"""Bytes of a block beyond any checkpoint: the checksums of 28 TiB."""

_HEAD = re.compile(MAGIC + rb"block (\d+)\nbytes (\d+)\n")


def block_size(content: int) -> int:
    """Bytes to leave free at the beginning of a file that will hold about `content` bytes more."""
    chunks = content // CHUNK + 8
    size = SMALLEST
    while size < 128 + 9 * chunks:
        size *= 2
    return size


def seal(path: Path, block: int, checksums: list[int] | None = None) -> int:
    """Fill in the first `block` bytes of a file, which are free, and make it durable.

    Args:
        path: the file.
        block: bytes.
        checksums: of its chunks, where they are known already.

    Returns:
        The bytes of the whole file.
    """
    descriptor = os.open(path, os.O_RDWR)
    try:
        size = os.fstat(descriptor).st_size
        if checksums is None:
            checksums = [zlib.crc32(chunk) for _, chunk in _chunks(descriptor, block)]
        os.pwrite(descriptor, _block(block, size, checksums), 0)
        os.fsync(descriptor)
        return size
    finally:
        os.close(descriptor)


def read_chunk(descriptor: int, start: int, into: memoryview) -> memoryview:
    """The chunk that begins at `start`, in the first bytes of `into`; shorter at the file's end."""
    filled = 0
    while filled < len(into) and (count := os.preadv(descriptor, [into[filled:]], start + filled)):
        filled += count
    return into[:filled]


def broken(path: Path, into: np.ndarray | None = None) -> str | None:
    """What is wrong with a file that begins with a block; None where every byte is as written.

    Args:
        path: the file.
        into: uint8, at least as long as the file: gets its bytes, so that they are read once.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return _broken(descriptor, into)
    finally:
        os.close(descriptor)


def wrong_length(path: Path) -> str | None:
    """What is wrong with a file's length, before memory is set aside for it; None if nothing is."""
    with path.open("rb") as file:
        head, size = _HEAD.match(file.read(SMALLEST)), os.fstat(file.fileno()).st_size
    if head is None:
        return "its first block is not as written"
    return None if int(head[2]) == size else f"it has {size} bytes, not the {int(head[2])} written"


def is_sealed(path: Path) -> bool:
    """Whether the file begins as a checkpoint does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def is_hdf5(path: Path) -> bool:
    """Whether the file begins as the HDF5 of other programs does."""
    with path.open("rb") as file:
        return file.read(len(HDF5)) == HDF5


def _broken(descriptor: int, into: np.ndarray | None) -> str | None:
    size = os.fstat(descriptor).st_size
    head = _HEAD.match(os.pread(descriptor, SMALLEST, 0))
    block = int(head[1]) if head else 0
    if not SMALLEST <= block <= min(size, LARGEST):
        return "its first block is not as written"
    found = os.pread(descriptor, block, 0)
    if into is not None:
        into[:block] = np.frombuffer(found, np.uint8)
    lines = found.rstrip(b"\0").split(b"\n")
    wanted = lines[4].split() if len(lines) > 4 else []
    checksums = []
    for number, (start, chunk) in enumerate(_chunks(descriptor, block, into)):
        checksums.append(zlib.crc32(chunk))
        if number < len(wanted) and wanted[number] != b"%08x" % checksums[-1]:
            return (
                f"bytes {start} to {start + len(chunk) - 1} of {size} do not match their checksum"
            )
    if found != _block(block, size, checksums):
        return f"its first {block} bytes, or its length of {size}, are not as written"
    return None


def _chunks(
    descriptor: int, start: int, into: np.ndarray | None = None
) -> Iterator[tuple[int, memoryview]]:
    """Place and bytes of every chunk; the bytes are gone with the next one, unless `into` them."""
    scratch = memoryview(bytearray(0 if into is not None else CHUNK))
    while chunk := read_chunk(
        descriptor, start, scratch if into is None else into[start : start + CHUNK].data
    ):
        yield start, chunk
        start += len(chunk)


def _block(block: int, size: int, checksums: list[int]) -> bytes:
    """The block that belongs to a file of `size` bytes with these checksums."""
    lines = [
        MAGIC.decode().strip(),
        f"block {block}",
        f"bytes {size}",
        f"crc32 of each {CHUNK}",
        " ".join(f"{checksum:08x}" for checksum in checksums),
        "",
    ]
    return "\n".join(lines).encode().ljust(block, b"\0")
