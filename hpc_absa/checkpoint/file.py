"""Checkpoints as HDF5 files: the only module here that imports h5py.

HDF5 lays a file out and keeps its names, types and attributes; the bytes of the arrays are written
and read past it, at the places it has given them. So they go to and from the disk at its speed, in
calls that leave the interpreter free for the training meanwhile (h5py's hold its lock).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_absa.checkpoint import seal
from hpc_absa.checkpoint.schema import (
    FORMAT,
    FORMAT_VERSION,
    Content,
    Fingerprint,
    Group,
    Key,
    Scalar,
    raw,
)
from hpc_absa.checkpoint.shards import SUFFIX
from hpc_absa.errors import CheckpointError

RESERVED = ("format", "format_version", "created", "digest")
"""Root attributes that describe the file, not the content; the digest leaves them out."""


SHARDS = "shards"
"""The group whose attributes name the shards."""

SHARD = "shard"
"""The root attribute with which a shard says its number: it is no checkpoint by itself."""


class NotACheckpointError(CheckpointError):
    """The path is no checkpoint of ours, good or damaged."""


@dataclass(frozen=True)
class Shard:
    """A file with some of a checkpoint's arrays, written by one rank."""

    name: str
    """Its file's, in the checkpoint's folder."""
    digest: str
    bytes: int
    fingerprints: Mapping[Key, Fingerprint]
    """Of the arrays in it."""


@dataclass(frozen=True)
class Written:
    """A file that has reached the disk."""

    bytes: int
    digest: str
    fingerprints: Mapping[Key, Fingerprint]


@dataclass(frozen=True)
class Place:
    """Where an array's bytes lie."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset in the file, bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class Outline:
    """A file without its arrays' bytes: small enough to be sent to every rank."""

    name: str
    attributes: Mapping[str, Scalar]
    groups: Mapping[str, Mapping[str, Scalar]]
    places: Mapping[Key, Place]
    """Of the arrays in this file; others lie in its shards."""
    digest: str
    shards: Mapping[str, str] = field(default_factory=dict)
    """Digests of the shards by their files' names, in the order of their numbers."""
    others: Mapping[Key, np.ndarray] = field(default_factory=dict)
    """Arrays that another program has laid out anew, compressed or in chunks."""


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
        with ThreadPoolExecutor(1) as pool:
            hashing = pool.submit(content.fingerprints)
            block = seal.block_size(content.nbytes())
            places = _lay_out(temporary, content, shards, block)
            _fill(temporary, content, places)
            own = hashing.result()
            linked = {key: of for shard in shards for key, of in shard.fingerprints.items()}
            digest = content.digest({**linked, **own})
            _sign(temporary, digest)
            syncing = pool.submit(_sync, temporary)  # the disk works while the memory is compared
            _compare(temporary, content, {**linked, **own})
            syncing.result()
            size = seal.seal(temporary, block)
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


def verify(path: Path) -> None:
    """Raise what `read` raises; the content itself is not kept."""
    read(path)


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
            outline = _outline(path)
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


def _lay_out(
    temporary: Path, content: Content, shards: tuple[Shard, ...], block: int
) -> dict[Key, Place]:
    """Make the file with everything but the arrays' bytes; says where those belong."""
    with h5py.File(temporary, "w", locking=False, userblock_size=block) as file:
        file.attrs.update(format=FORMAT, format_version=FORMAT_VERSION, created=time.time())
        file.attrs.update(content.attributes)
        for name, group in content.groups.items():
            file.create_group(name).attrs.update(group.attributes)
        places = {
            (name, key): _place(file[name], key, array)
            for (name, key), array in content.arrays().items()
        }
        if shards:
            file.create_group(SHARDS).attrs.update({s.name: s.digest for s in shards})
        for shard in shards:
            for name, key in shard.fingerprints:
                file[f"{name}/{key}"] = h5py.ExternalLink(shard.name, f"/{name}/{key}")
    return places


def _place(group: h5py.Group, key: str, array: np.ndarray) -> Place:
    """Create a data set whose bytes have their place in the file from the beginning."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    shape = array.shape
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    kind = h5py.h5t.py_create(array.dtype, logical=True)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    made = h5py.h5d.create(group.id, None, kind, space, settings)
    h5py.h5o.link(made, group.id, key.encode(), lcpl=links)
    return Place(array.dtype.str, shape, made.get_offset() if array.nbytes else 0)


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


def _sign(temporary: Path, digest: str) -> None:
    with h5py.File(temporary, "r+", locking=False) as file:
        file.attrs["digest"] = digest


def _compare(temporary: Path, content: Content, fingerprints: Mapping[Key, Fingerprint]) -> None:
    """Raise unless the file, read back, says what `content` says."""
    outline = _outline(temporary)
    bare = Content(outline.attributes, {name: Group(of) for name, of in outline.groups.items()})
    same = bare.digest(fingerprints) == outline.digest == content.digest(fingerprints)
    arrays = content.arrays()
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        same = same and outline.places.keys() == arrays.keys()
        if not same or not all(
            _holds(descriptor, outline.places[key], array) for key, array in arrays.items()
        ):
            raise CheckpointError("what was read back is not what was written")
    finally:
        os.close(descriptor)


def _holds(descriptor: int, place: Place, array: np.ndarray) -> bool:
    """Whether the file has the array's bytes at its place."""
    if (place.dtype, place.shape) != (array.dtype.str, array.shape):
        return False
    data = raw(array)
    scratch = memoryview(bytearray(min(len(data), seal.CHUNK)))
    for begin in range(0, len(data), seal.CHUNK):
        piece = data[begin : begin + seal.CHUNK]
        back = scratch[: len(piece)]
        if os.preadv(descriptor, [back], place.start + begin) != len(piece):
            return False
        if not np.array_equal(back, piece):
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


# Reading


def _outline(path: Path) -> Outline:
    """What HDF5 says of the file; its bytes must have been checked."""
    with h5py.File(path, "r", locking=False) as file:
        version = int(file.attrs["format_version"])
        if version != FORMAT_VERSION:
            age = "a newer" if version > FORMAT_VERSION else "an older"
            raise CheckpointError(
                f"{path}: format version {version}, expected {FORMAT_VERSION}: "
                f"it was written by {age} hpc-absa; install that one to read it"
            )
        groups = {name: _attributes(file[name]) for name in file if name != SHARDS}
        found = {(name, key): item for name in groups for key, item in _data_sets(file[name])}
        places = {key: _placed(item) for key, item in found.items()}
        return Outline(
            path.name,
            {k: v for k, v in _attributes(file).items() if k not in RESERVED},
            groups,
            {key: place for key, place in places.items() if place},
            str(file.attrs["digest"]),
            {k: str(v) for k, v in sorted(file[SHARDS].attrs.items())} if SHARDS in file else {},
            {key: np.asarray(found[key][()]) for key, place in places.items() if not place},
        )


def _data_sets(group: h5py.Group, prefix: str = "") -> Iterator[tuple[str, h5py.Dataset]]:
    """Names and data sets in this file; HDF5 made groups of the slashes that a name had."""
    for name in group:
        if isinstance(group.get(name, getlink=True), h5py.ExternalLink):
            continue
        item = group[name]
        if isinstance(item, h5py.Group):
            yield from _data_sets(item, f"{prefix}{name}/")
        else:
            yield prefix + name, item


def _placed(item: h5py.Dataset) -> Place | None:
    """Where the bytes lie, None where they do not lie in one piece."""
    if not item.nbytes:
        return Place(item.dtype.str, item.shape, 0)
    start = item.id.get_offset()
    return None if start is None else Place(item.dtype.str, item.shape, start)


def _attributes(place: Any) -> dict[str, Scalar]:
    """Attributes as Python scalars: HDF5 gives numpy's."""
    return {
        key: value.item() if isinstance(value, np.generic) else str(value)
        for key, value in place.attrs.items()
    }


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
