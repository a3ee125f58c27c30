"""Checkpoint files: written completely or not at all, read only if every byte is as written."""

from __future__ import annotations

import bisect
import errno
import itertools
import os
import shutil
import threading
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
from hpc_absa.errors import CheckpointError, first_line
from hpc_absa.rundir.files import replacing, sync
from hpc_absa.rundir.paths import CHECKPOINT_NAME

SHARD_SUFFIX = ".shard"
"""Not `.h5`: whoever takes the newest `*.h5` of a folder gets a whole checkpoint."""


@dataclass(frozen=True)
class Image:
    """A verified file in memory."""

    outline: Outline
    bytes: np.ndarray
    """uint8, the whole file."""

    def arrays(self) -> dict[Key, np.ndarray]:
        """The arrays in this file, as views of its bytes."""
        arrays = {}
        for key, place in self.outline.places.items():
            piece = self.bytes[place.start : place.start + place.nbytes]
            if piece.ctypes.data % np.dtype(place.dtype).alignment:
                piece = piece.copy()
            arrays[key] = piece.view(place.dtype).reshape(place.shape)
        return arrays


def write(path: Path, content: Content, shards: tuple[Written, ...] = ()) -> Written:
    """Publish `content` at `path`, complete and verified, or not at all.

    A temporary file in the same folder, fsync, comparison with memory, rename, fsync of the folder:
    after a crash at any moment `path` is absent, the previous file, or this one. `content` must not
    change meanwhile; the new file links to `shards`, durable files with further arrays.

    Raises:
        CheckpointError: names path and cause (full disk, no permission, ...); nothing remains.
    """
    try:
        with replacing(path, durable=True) as temporary, ThreadPoolExecutor(3) as pool:
            # The bytes first, so that the disk, which takes longest, begins early. While one thread
            # waits for it, two compute the digest and then compare.
            block = integrity.block_size(content.nbytes())
            places = layout.lay_out(temporary, content, shards, block)
            with temporary.open("r+b") as file:
                for key, array in content.arrays().items():
                    hdf5.write_at(file.fileno(), raw(array), places[key].start)
            syncing = pool.submit(sync, temporary)
            arrays = content.arrays()
            own = dict(zip(arrays, pool.map(fingerprint, arrays.values()), strict=True))
            linked = {key: of for shard in shards for key, of in shard.fingerprints.items()}
            digest = content.digest({**linked, **own})
            layout.set_digest(temporary, digest)
            outline = layout.outline(temporary)
            same = outline.scalars.digest({}) == content.digest({})
            listed = {shard.name: shard.digest for shard in shards}
            same &= (outline.places, outline.digest, outline.shards) == (places, digest, listed)
            checksums = _compare(temporary, content, places, block, pool) if same else None
            if checksums is None:
                raise CheckpointError("what was read back is not what was written")
            syncing.result()
            size = integrity.seal(temporary, block, checksums)
    except Exception as error:
        raise CheckpointError(f"{path}: cannot be written: {_cause(path, error)}") from None
    return Written(path.name, size, digest, own)


def read(path: Path) -> Content:
    """The content of the checkpoint at `path` and its shards, verified.

    Raises:
        NotACheckpointError: there is no such file, or it does not begin as a checkpoint.
        CheckpointError: damaged, a shard missing or damaged, or of another format version.
    """
    image = load(path)
    content = image.outline.scalars.with_arrays(image.arrays())
    for name, digest in image.outline.shards.items():
        content = content.with_arrays(load_shard(path.with_name(name), digest).arrays())
    return content


def load(path: Path) -> Image:
    """One file, read once and verified; raises as `read`.

    A file that is named as a checkpoint must be the one of the step in its name.
    """
    file = integrity.read_verified(path)
    try:
        outline = layout.outline(path)
    except CheckpointError:
        raise
    except Exception as error:  # h5py has no common class of errors
        raise CheckpointError(f"{path}: damaged: {first_line(error)}") from None
    attributes, named = outline.scalars.attributes, CHECKPOINT_NAME.fullmatch(path.name)
    if SHARD in attributes and path.suffix != SHARD_SUFFIX:
        raise CheckpointError(f"{path}: damaged: a shard under the name of a checkpoint")
    if named and int(named["step"]) != attributes.get("step"):
        raise CheckpointError(
            f"{path}: damaged: it contains step {attributes.get('step')}, "
            f"not the {int(named['step'])} in its name"
        )
    return Image(outline, file)


def load_shard(path: Path, digest: str) -> Image:
    """A shard, verified to be the one with this digest; raises a CheckpointError."""
    if not path.exists():
        raise CheckpointError(f"{path}: missing, a shard of its checkpoint")
    image = load(path)
    if image.outline.digest != digest:
        raise CheckpointError(
            f"{path}: damaged: its content has digest {image.outline.digest}, not {digest}"
        )
    return image


def _compare(
    path: Path,
    content: Content,
    places: Mapping[Key, Place],
    block: int,
    pool: ThreadPoolExecutor,
) -> list[int] | None:
    """Read the file back; the checksums of its chunks, None if the arrays' bytes differ."""
    arrays = sorted(
        ((places[key].start, raw(array)) for key, array in content.arrays().items()),
        key=lambda each: each[0],
    )
    local = threading.local()

    def check(start: int) -> tuple[int, bool]:
        if not hasattr(local, "buffer"):
            local.buffer = memoryview(bytearray(integrity.CHUNK))
        chunk = integrity.read_chunk(file.fileno(), start, local.buffer)
        return zlib.crc32(chunk), _contains(chunk, start, arrays)

    with path.open("rb") as file:
        starts = range(block, os.fstat(file.fileno()).st_size, integrity.CHUNK)
        checked = list(pool.map(check, starts))
    return [checksum for checksum, _ in checked] if all(good for _, good in checked) else None


def _contains(chunk: memoryview, start: int, arrays: list[tuple[int, memoryview]]) -> bool:
    """Whether the file's bytes from `start` on are those of the arrays there.

    `arrays` has the offset and the bytes of every array, sorted by offset.
    """
    stop = start + len(chunk)
    first = max(0, bisect.bisect_right(arrays, start, key=lambda each: each[0]) - 1)
    for at, data in itertools.takewhile(lambda each: each[0] < stop, arrays[first:]):
        low, high = max(at, start), min(at + len(data), stop)
        if low < high and not np.array_equal(
            chunk[low - start : high - start], data[low - at : high - at]
        ):
            return False
    return True


def _cause(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        free = shutil.disk_usage(path.parent).free
        return f"no space left on the device ({free / 1e6:.0f} MB free)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)
