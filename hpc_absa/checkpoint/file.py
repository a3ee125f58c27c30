"""Checkpoints as files: written whole or not at all, read only where every byte is as written.

HDF5 lays a file out (`layout`); the bytes of the arrays are written and read past it, at the places
it has given them. So they go to and from the disk at its speed, in calls that leave the interpreter
free for the training meanwhile (h5py's hold its lock).
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import os
import threading
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hpc_absa.checkpoint import layout, seal
from hpc_absa.checkpoint.layout import SHARD, Outline, Place, Shard
from hpc_absa.checkpoint.schema import FORMAT, Content, Fingerprint, Group, Key, raw
from hpc_absa.checkpoint.shards import SUFFIX
from hpc_absa.errors import CheckpointError


class NotACheckpointError(CheckpointError):
    """The path is no checkpoint of ours, good or damaged."""


@dataclass(frozen=True)
class Written:
    """A file that has reached the disk."""

    bytes: int
    digest: str
    fingerprints: Mapping[Key, Fingerprint]


@dataclass(frozen=True)
class Image:
    """A file in memory, its bytes as they were written."""

    outline: Outline
    bytes: np.ndarray
    """uint8, the whole file."""

    @cached_property
    def fingerprints(self) -> dict[Key, Fingerprint]:
        """Of the arrays in this file."""
        return self.content().fingerprints()

    def content(self) -> Content:
        """The content; its arrays are views of the bytes."""
        outline = self.outline
        arrays: dict[str, dict[str, np.ndarray]] = {name: {} for name in outline.groups}
        for (group, key), place in outline.places.items():
            piece = self.bytes[place.start : place.start + place.nbytes]
            if piece.ctypes.data % np.dtype(place.dtype).alignment:
                piece = piece.copy()
            arrays[group][key] = piece.view(place.dtype).reshape(place.shape)
        for (group, key), array in outline.others.items():
            arrays[group][key] = array
        groups = {name: Group(of, arrays[name]) for name, of in outline.groups.items()}
        return Content(outline.attributes, groups)


def write(path: Path, content: Content, shards: tuple[Shard, ...] = ()) -> Written:
    """Publish `content` at `path`, whole and verified or not at all.

    Temporary file in the same folder, fsync, comparison with the memory, rename, fsync of the
    folder: after a crash at any moment `path` is absent, the former file, or this one complete.

    Args:
        path: the file.
        content: what it will say; it must not change meanwhile.
        shards: durable files with further arrays, which this file will point to.

    Raises:
        CheckpointError: names path and cause (full disk, no permission, ...); nothing is left.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # The bytes first, so that the disk begins early: it is what takes longest. While one thread
        # waits for it, two hash and then compare.
        with ThreadPoolExecutor(3) as pool:
            block = seal.block_size(content.nbytes())
            _fill(temporary, content, layout.lay_out(temporary, content, shards, block))
            syncing = pool.submit(_sync, temporary)
            arrays = content.arrays()
            own = dict(zip(arrays, pool.map(Fingerprint.of, arrays.values()), strict=True))
            linked = {key: of for shard in shards for key, of in shard.fingerprints.items()}
            digest = content.digest({**linked, **own})
            layout.sign(temporary, digest)
            checksums = _compare(temporary, content, {**linked, **own}, block, pool)
            syncing.result()
            size = seal.seal(temporary, block, checksums)
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(f"{path}: cannot be written: {_cause(path, error)}") from None
    return Written(size, digest, own)


def read(path: Path) -> Content:
    """The content of the checkpoint at `path`, verified: every byte, and the digest.

    Raises:
        NotACheckpointError: no such file, or one that does not begin as a checkpoint.
        CheckpointError: damaged, a shard missing or damaged, or of another format version.
    """
    image = load(path)
    content, fingerprints = image.content(), dict(image.fingerprints)
    for name, digest in image.outline.shards.items():
        shard = load_shard(path.with_name(name), digest)
        content = joined(content, shard.content())
        fingerprints |= shard.fingerprints
    require_digest(path, content.digest(fingerprints), image.outline.digest)
    return content


def load(path: Path) -> Image:
    """One file, read once; its bytes are as they were written.

    Raises:
        As `read`, which looks at the digest and at shards, too.
    """
    require_checkpoint(path)
    try:
        wrong = seal.wrong_length(path)
        image = np.empty(0 if wrong else path.stat().st_size, np.uint8)
        wrong = wrong or seal.broken(path, image)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if wrong is None:
        try:
            outline = layout.outline(path)
            if SHARD in outline.attributes and path.suffix != SUFFIX:
                raise CheckpointError(f"{path}: damaged: a shard, under the name of a whole one")
            return Image(outline, image)
        except CheckpointError:
            raise
        # h5py has no one kind of error for what it cannot make sense of.
        except Exception as error:
            wrong = _first_line(error)
    raise CheckpointError(f"{path}: damaged: {wrong}")


def load_shard(path: Path, digest: str) -> Image:
    """A shard, verified to be the one with this digest.

    Raises:
        CheckpointError: missing, damaged, or another one.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: missing, a shard of its checkpoint")
    image = load(path)
    require_digest(path, image.outline.digest, digest)
    require_digest(path, image.content().digest(image.fingerprints), digest)
    return image


def joined(content: Content, shard: Content) -> Content:
    """`content` with a shard's arrays."""
    groups = {
        name: Group(of.attributes, {**of.arrays, **shard.groups.get(name, Group()).arrays})
        for name, of in content.groups.items()
    }
    return Content(content.attributes, groups)


def require_digest(path: Path, found: str, wanted: str) -> None:
    """Raise `CheckpointError` unless both are the same."""
    if found != wanted:
        raise CheckpointError(f"{path}: damaged: its content has digest {found}, not {wanted}")


def require_checkpoint(path: Path) -> None:
    """Refuse what does not begin as a file that `write` has made."""
    try:
        if not path.exists():
            raise NotACheckpointError(f"{path}: no such file")
        if not path.is_file():
            raise NotACheckpointError(f"{path}: not a file")
        if seal.is_sealed(path):
            return
        if seal.is_hdf5(path):
            raise NotACheckpointError(f"{path}: an HDF5 file, but no checkpoint of {FORMAT}")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    if path.suffix == ".h5":
        raise CheckpointError(f"{path}: damaged: it does not begin as a checkpoint")
    raise NotACheckpointError(f"{path}: not a checkpoint")


# Writing


def _fill(temporary: Path, content: Content, places: Mapping[Key, Place]) -> None:
    descriptor = os.open(temporary, os.O_WRONLY)
    try:
        for key, array in content.arrays().items():
            data, start = raw(array), places[key].start
            for begin in range(0, len(data), seal.CHUNK):
                piece = data[begin : begin + seal.CHUNK]
                while piece:  # more than once only on a full disk, which the second write reports
                    count = os.pwrite(descriptor, piece, start + begin)
                    piece, begin = piece[count:], begin + count
    finally:
        os.close(descriptor)


def _compare(
    temporary: Path,
    content: Content,
    fingerprints: Mapping[Key, Fingerprint],
    block: int,
    pool: ThreadPoolExecutor,
) -> list[int]:
    """Raise unless the file, read back, says what `content` says.

    Returns:
        The checksums that belong into its first `block` bytes: what was compared is what is sealed.
    """
    outline = layout.outline(temporary)
    bare = Content(outline.attributes, {name: Group(of) for name, of in outline.groups.items()})
    same = bare.digest(fingerprints) == outline.digest == content.digest(fingerprints)
    arrays, places = content.arrays(), outline.places
    same = same and {key: (of.dtype, of.shape) for key, of in places.items()} == {
        key: (of.dtype.str, of.shape) for key, of in arrays.items()
    }
    wanted = [(places[key].start, raw(array)) for key, array in arrays.items()] if same else []
    wanted.sort(key=lambda each: each[0])
    own = threading.local()
    descriptor = os.open(temporary, os.O_RDONLY)

    def look(start: int) -> tuple[int, bool]:
        if not hasattr(own, "scratch"):
            own.scratch = memoryview(bytearray(seal.CHUNK))
        chunk = seal.read_chunk(descriptor, start, own.scratch)
        return zlib.crc32(chunk), _holds(chunk, start, wanted)

    try:
        starts = range(block, os.fstat(descriptor).st_size, seal.CHUNK)
        looked = list(pool.map(look, starts))
    finally:
        os.close(descriptor)
    if not same or not all(held for _, held in looked):
        raise CheckpointError("what was read back is not what was written")
    return [checksum for checksum, _ in looked]


def _holds(chunk: memoryview, start: int, wanted: list[tuple[int, memoryview]]) -> bool:
    """Whether the bytes of a file from `start` on are those of the arrays that lie there.

    Args:
        chunk: the file's bytes.
        start: their place in it.
        wanted: place and bytes of all arrays, by place.
    """
    stop = start + len(chunk)
    first = max(0, bisect.bisect_right(wanted, start, key=lambda each: each[0]) - 1)
    for at, data in itertools.takewhile(lambda each: each[0] < stop, wanted[first:]):
        low, high = max(at, start), min(at + len(data), stop)
        if low < high and not np.array_equal(
            chunk[low - start : high - start], data[low - at : high - at]
        ):
            return False
    return True


def _sync(path: Path) -> None:
    """Make a file, or a folder's renames, durable; not every file system can sync a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():
            raise
    finally:
        os.close(descriptor)


# Errors


def _cause(path: Path, error: BaseException) -> str:
    """HDF5 buries a full disk in a stack of its own; say what a person can act on."""
    text = str(error)
    if "No space left" in text or "errno = 28" in text:
        free = os.statvfs(path.parent).f_bavail * os.statvfs(path.parent).f_frsize
        return f"no space left on the device ({free / 1e6:.0f} MB free)"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
