"""Checkpoint files: written completely or not at all, read only if every byte is as written."""

from __future__ import annotations

import bisect
import ctypes
import errno
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from isal.isal_zlib import crc32

from hpc_absa import hdf5
from hpc_absa.checkpoint import format as layout
from hpc_absa.checkpoint import integrity
from hpc_absa.checkpoint.format import (
    SHARD,
    Content,
    Key,
    Outline,
    Place,
    Written,
    fingerprint,
    raw,
)
from hpc_absa.checkpoint.integrity import VerifiedFile
from hpc_absa.errors import CheckpointError, first_line
from hpc_absa.rundir.files import replacing, sync
from hpc_absa.rundir.paths import CHECKPOINT_NAME

_libc = ctypes.CDLL(None)

READ_BACK = 1 << 20
"""Bytes at a time: they stay in the processor's cache."""

WRITE_BEHIND = 16 << 20
"""Bytes after which the disk is given what was written."""

SYNC_FILE_RANGE_WRITE = 2

SHARD_SUFFIX = ".shard"
"""Not `.h5`: whoever takes the newest `*.h5` of a folder gets a whole checkpoint."""


def views(memory: np.ndarray, places: Mapping[Key, Place]) -> dict[Key, np.ndarray]:
    """The arrays at `places`, without a copy where they are aligned."""
    arrays = {}
    for key, place in places.items():
        piece = memory[place.start : place.start + place.nbytes]
        if piece.ctypes.data % np.dtype(place.dtype).alignment:
            piece = piece.copy()
        arrays[key] = piece.view(place.dtype).reshape(place.shape)
    return arrays


def write(
    path: Path,
    content: Content,
    shards: tuple[Written, ...] = (),
    ready: Callable[[], object] = bool,
) -> Written:
    """Publish `content` at `path`, complete and verified, or not at all.

    A temporary file in the same folder, fsync, comparison with memory, rename, fsync of the folder:
    after a crash at any moment `path` is absent, the previous file, or this one.

    Args:
        path: the file.
        content: its arrays must not change once `ready` has returned.
        shards: durable files with further arrays, to which the new file links.
        ready: returns when the arrays have their values; the file is laid out before.

    Raises:
        CheckpointError: names path and cause (full disk, no permission, ...); nothing remains.
    """
    try:
        with (
            replacing(path) as temporary,
            temporary.open("xb", 0) as file,
            ThreadPoolExecutor(1) as disk,  # which takes longest
        ):
            arrays, block = content.arrays(), integrity.block_size(content.nbytes())
            with layout.lay_out(content, block) as (laid_out, image, places):
                ready()
                data = in_file(arrays, places)
                writing = disk.submit(_write, file.fileno(), data)
                own = {key: fingerprint(array) for key, array in arrays.items()}
                linked = {key: of for shard in shards for key, of in shard.fingerprints.items()}
                digest = content.digest({**linked, **own})
                layout.complete(laid_out, content, shards, digest)
            gaps = _gaps(image, block, data)
            pieces = sorted([*gaps, *data], key=_start)
            first = integrity.first_block(block, image.size, _checksums(pieces))
            gaps.insert(0, (0, memoryview(first)))
            writing.result()
            _write(file.fileno(), gaps)
            syncing = disk.submit(os.fsync, file.fileno())
            _compare(temporary, [gaps[0], *pieces])
            syncing.result()
        sync(path.parent)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be written: {_cause(path, error)}") from None
    return Written(path.name, image.size, digest, own)


def read(path: Path) -> Content:
    """The content of the checkpoint at `path` and its shards, verified.

    Raises:
        NotACheckpointError: there is no such file, or it does not begin as a checkpoint.
        CheckpointError: damaged, a shard missing or damaged, or of another format version.
    """
    outline, arrays = _read(path, None)
    content = outline.scalars.with_arrays(arrays)
    for name, digest in outline.shards.items():
        content = content.with_arrays(_read(path.with_name(name), digest)[1])
    return content


def verify(path: Path) -> Outline:
    """Verify one file without its shards; raises as `read`."""
    with VerifiedFile(path) as opened:
        outline, buffer = describe(opened), opened.buffer()
        for number in range(opened.chunks):
            opened.read_chunk(number, buffer)
    return outline


def _read(path: Path, digest: str | None) -> tuple[Outline, dict[Key, np.ndarray]]:
    if digest and not path.exists():
        raise missing(path)
    with VerifiedFile(path) as opened:
        outline, buffer = describe(opened, digest), opened.buffer()
        arrays = {k: np.empty(place.shape, place.dtype) for k, place in outline.places.items()}
        pieces = in_file(arrays, outline.places)
        for number in range(opened.chunks):
            fill(pieces, opened.start(number), opened.read_chunk(number, buffer))
    return outline, arrays


def missing(shard: Path) -> CheckpointError:
    return CheckpointError(f"{shard}: missing, a shard of its checkpoint")


def describe(opened: VerifiedFile, digest: str | None = None) -> Outline:
    """The outline of a file, which keeps the chunks that have it; raises as `read`.

    A file that is named as a checkpoint must be the one of the step in its name, and a shard the
    one with this digest.
    """
    path, wrong = opened.path, ""
    try:
        if opened.chunks:
            opened.keep_chunk(0)
        outline = layout.outline(path, opened)
    except CheckpointError as error:
        wrong = str(error)
    except Exception as error:  # h5py has no common class of errors
        wrong = opened.error or f"{path}: damaged: {first_line(error)}"
    if wrong:  # not above: a traceback with HDF5's objects would keep its file open
        raise CheckpointError(wrong)
    attributes, named = outline.scalars.attributes, CHECKPOINT_NAME.fullmatch(path.name)
    if SHARD in attributes and path.suffix != SHARD_SUFFIX:
        raise CheckpointError(f"{path}: damaged: a shard under the name of a checkpoint")
    if named and int(named["step"]) != attributes.get("step"):
        raise CheckpointError(
            f"{path}: damaged: it contains step {attributes.get('step')}, "
            f"not the {int(named['step'])} in its name"
        )
    if digest and outline.digest != digest:
        raise CheckpointError(
            f"{path}: damaged: its content has digest {outline.digest}, not {digest}"
        )
    return outline


Piece = tuple[int, memoryview]
"""Offset in the file, and bytes."""


def in_file(arrays: Mapping[Key, np.ndarray], places: Mapping[Key, Place]) -> list[Piece]:
    """The bytes of arrays, sorted by their place in the file."""
    pieces = [(places[key].start, raw(array)) for key, array in arrays.items() if array.size]
    return sorted(pieces, key=_start)


def fill(pieces: list[Piece], start: int, data: memoryview) -> None:
    """Copy bytes of the file, from `start` on, into the pieces that they belong to."""
    for at, piece, low, high in _overlaps(pieces, start, start + len(data)):
        piece[low - at : high - at] = data[low - start : high - start]


def _overlaps(
    pieces: list[Piece], start: int, stop: int
) -> Iterator[tuple[int, memoryview, int, int]]:
    """The pieces with bytes of that range of the file, and which part of the range each has."""
    first = max(0, bisect.bisect_right(pieces, start, key=_start) - 1)
    for at, data in itertools.takewhile(lambda piece: piece[0] < stop, pieces[first:]):
        low, high = max(at, start), min(at + len(data), stop)
        if low < high:
            yield at, data, low, high


def _gaps(image: hdf5.MemoryFile, block: int, data: list[Piece]) -> list[Piece]:
    """What HDF5 wrote before, between and after the arrays' bytes, which are sorted."""
    gaps, end = list[tuple[int, bytearray]](), block
    for start, piece in [*data, (image.size, memoryview(b""))]:
        gaps.append((end, bytearray(start - end)))
        end = start + len(piece)
    for at, written in image.writes:  # not the first elements of arrays (`reserve_together`)
        start, gap = gaps[bisect.bisect_right(gaps, at, key=_start) - 1]
        if at < start + len(gap):
            memoryview(gap)[at - start : at - start + len(written)] = written
    return [(start, memoryview(gap)) for start, gap in gaps if gap]


def _write(file: int, pieces: list[Piece]) -> None:
    """Write the pieces, and have the disk begin before the last of them."""
    begin = pieces[0][0] if pieces else 0
    for at, piece in pieces:
        for offset in range(0, len(piece), WRITE_BEHIND):
            part = piece[offset : offset + WRITE_BEHIND]
            hdf5.write_at(file, part, at + offset)
            end = at + offset + len(part)
            if end - begin >= WRITE_BEHIND:  # whether it is possible or not: fsync reports errors
                start, length = ctypes.c_int64(begin), ctypes.c_int64(end - begin)
                _libc.sync_file_range(file, start, length, SYNC_FILE_RANGE_WRITE)
                begin = end


def _checksums(pieces: list[Piece]) -> list[int]:
    """Of the chunks of a file that has these pieces after its first block."""
    checksums, room = [0], integrity.CHUNK
    for _, data in pieces:
        while data:
            if not room:
                checksums.append(0)
                room = integrity.CHUNK
            checksums[-1] = crc32(data[:room], checksums[-1])
            room, data = room - len(data[:room]), data[room:]
    return checksums


def _compare(path: Path, pieces: list[Piece]) -> None:
    """Read the file back.

    Raises:
        CheckpointError: it is not made of these pieces.
    """
    buffer, (last, data) = memoryview(bytearray(READ_BACK)), pieces[-1]
    size = last + len(data)
    with path.open("rb") as file:
        for start in range(0, size, READ_BACK):
            chunk = integrity.read_chunk(file.fileno(), start, buffer)
            complete = os.fstat(file.fileno()).st_size == size
            if not complete or not _contains(chunk, start, pieces):
                raise CheckpointError("what was read back is not what was written")


def _contains(chunk: memoryview, start: int, pieces: list[Piece]) -> bool:
    """Whether the file's bytes from `start` on are those of the pieces there."""
    return all(
        _same(chunk[low - start : high - start], data[low - at : high - at])
        for at, data, low, high in _overlaps(pieces, start, start + len(chunk))
    )


def _same(one: memoryview, other: memoryview) -> bool:
    addresses = [np.frombuffer(each, np.uint8).ctypes.data for each in (one, other)]
    return not _libc.memcmp(*map(ctypes.c_void_p, addresses), ctypes.c_size_t(len(one)))


def _start(piece: tuple[int, Any]) -> int:
    return piece[0]


def _cause(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        free = shutil.disk_usage(path.parent).free
        return f"no space left on the device ({free / 1e6:.0f} MB free)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
