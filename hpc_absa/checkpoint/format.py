"""The content of a checkpoint, and how HDF5 lays it out (`docs/checkpoint-format.md`).

HDF5 keeps names, types and attributes, and decides where the bytes of arrays belong; `file` writes
and reads those bytes itself, at the speed of the disk and without the interpreter's lock.
"""

from __future__ import annotations

import io
import math
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from xxhash import xxh3_128

from hpc_absa import hdf5
from hpc_absa.errors import CheckpointError

FORMAT = "hpc-absa"
FORMAT_VERSION = 2

DIGEST = "xxh3-128"
"""The hash of the digest, and its first word; `sha256` in files of earlier versions."""

RESERVED = ("format", "format_version", "created", "digest")
"""Root attributes that describe the file and not the content; the digest leaves them out."""

SHARDS = "shards"
"""The group whose attributes name the shards."""

SHARD = "shard"
"""Root attribute with the number of a shard, which is not a checkpoint by itself."""

Scalar = int | float | str | bool

Key = tuple[str, str]
"""An array's group and name."""


@dataclass(frozen=True)
class Group:
    """A named part of the content: scalars are attributes, arrays are data sets."""

    attributes: Mapping[str, Scalar] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


Fingerprint = tuple[str, bytes]
"""What the digest needs of an array, which may be in another file."""


def fingerprint(array: np.ndarray) -> Fingerprint:
    """Its type and shape, and the XXH3-128 of its bytes in C order."""
    kind = f"array {array.dtype.str} {list(array.shape)}"
    return kind, xxh3_128(raw(array)).digest()


@dataclass(frozen=True)
class Content:
    attributes: Mapping[str, Scalar]
    """Root attributes: epoch, step, samples, world_size, global_batch, ..."""
    groups: Mapping[str, Group]
    """`model`, `optimizer`, `schedule`, `data`, `rng`, `curvature`, `job`, `versions`, ..."""

    def arrays(self) -> dict[Key, np.ndarray]:
        """All arrays by group and name, sorted."""
        return {
            (name, key): self.groups[name].arrays[key]
            for name in sorted(self.groups)
            for key in sorted(self.groups[name].arrays)
        }

    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())

    def scalars(self) -> Content:
        """The same without arrays."""
        return Content(self.attributes, {n: Group(g.attributes) for n, g in self.groups.items()})

    def with_arrays(self, arrays: Mapping[Key, np.ndarray]) -> Content:
        """The same scalars with these arrays added."""
        groups = {
            name: Group(
                group.attributes,
                {**group.arrays, **{key: a for (of, key), a in arrays.items() if of == name}},
            )
            for name, group in self.groups.items()
        }
        return Content(self.attributes, groups)

    def digest(self, fingerprints: Mapping[Key, Fingerprint] | None = None) -> str:
        """XXH3-128 over the content in a fixed order, independent of HDF5's layout.

        The hash runs over one record for each group, attribute and array, sorted by name: path,
        kind and value with their lengths, so that no two contents have the same byte stream. An
        array's value is the hash of its bytes, so that ranks can hash a part each.
        `fingerprints` are those of all arrays, if they are known or in other files.
        """
        if fingerprints is None:
            fingerprints = {key: fingerprint(array) for key, array in self.arrays().items()}
        hasher = xxh3_128()
        _hash_attributes(hasher, "/", self.attributes)
        for name in sorted(self.groups):
            _hash(hasher, f"/{name}", "group", b"")
            _hash_attributes(hasher, f"/{name}", self.groups[name].attributes)
            for group, key in sorted(fingerprints):
                if group == name:
                    _hash(hasher, f"/{name}/{key}", *fingerprints[group, key])
        return f"{DIGEST}:{hasher.hexdigest()}"


@dataclass(frozen=True)
class Written:
    """A file that is on disk: a checkpoint, or a shard, which has some of its arrays."""

    name: str
    """In the checkpoint's folder."""
    bytes: int
    digest: str
    fingerprints: Mapping[Key, Fingerprint]
    """Of the arrays in it."""


@dataclass(frozen=True)
class Place:
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Offset in bytes."""

    @property
    def nbytes(self) -> int:
        return np.dtype(self.dtype).itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Outline:
    """A file without the bytes of its arrays: small enough to be sent to every rank."""

    scalars: Content
    """The content without arrays."""
    places: Mapping[Key, Place]
    """Of the arrays in this file; others are in its shards."""
    digest: str
    shards: Mapping[str, str]
    """Digests of the shards by their file names, in the order of their numbers."""


@contextmanager
def lay_out(
    content: Content, block: int
) -> Iterator[tuple[h5py.File, hdf5.MemoryFile, dict[Key, Place]]]:
    """The file with its groups and arrays, and where the bytes of those belong.

    Args:
        content: of the file.
        block: bytes at its beginning that stay free (HDF5's user block).
    """
    image = hdf5.MemoryFile()
    with h5py.File(image, "w", userblock_size=block) as file:
        groups = {name: file.create_group(name) for name in content.groups}
        arrays = content.arrays()
        starts = hdf5.reserve_together(
            (groups[name].id, key, array.dtype, array.shape)
            for (name, key), array in arrays.items()
        )
        places = {
            key: Place(array.dtype.str, array.shape, start)
            for (key, array), start in zip(arrays.items(), starts, strict=True)
        }
        yield file, image, places


def complete(file: h5py.File, content: Content, shards: tuple[Written, ...], digest: str) -> None:
    """Write everything but the arrays' bytes, with links to the arrays in `shards`."""
    file.attrs.update(format=FORMAT, format_version=FORMAT_VERSION, created=time.time())
    file.attrs.update(content.attributes, digest=digest)
    for name, group in content.groups.items():
        file[name].attrs.update(group.attributes)
    if shards:
        file.create_group(SHARDS).attrs.update({s.name: s.digest for s in shards})
    for shard in shards:
        for name, key in shard.fingerprints:
            file[f"{name}/{key}"] = h5py.ExternalLink(shard.name, f"/{name}/{key}")


def outline(path: Path, source: io.RawIOBase | None = None) -> Outline:
    """Read a file's outline; the bytes that HDF5 reads must be verified.

    Args:
        path: of the file.
        source: what HDF5 reads instead of the file.

    Raises:
        CheckpointError: it has another format version.
    """
    with h5py.File(source or path, "r", locking=False) as file:
        version = int(file.attrs["format_version"])
        if version != FORMAT_VERSION:
            age = "a newer" if version > FORMAT_VERSION else "an older"
            raise CheckpointError(
                f"{path}: format version {version}, expected {FORMAT_VERSION}: "
                f"it was written by {age} hpc-absa; install that one to read it"
            )
        attributes = {k: v for k, v in _attributes(file).items() if k not in RESERVED}
        groups = {name: Group(_attributes(file[name])) for name in file if name != SHARDS}
        return Outline(
            Content(attributes, groups),
            {(name, key): place for name in groups for key, place in _places(file[name].id)},
            str(file.attrs["digest"]),
            {k: str(v) for k, v in sorted(file[SHARDS].attrs.items())} if SHARDS in file else {},
        )


def raw(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order, without a copy where it is contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _places(group: Any, prefix: bytes = b"") -> Iterator[tuple[str, Place]]:
    """Names and places of the arrays in this file; a slash in a name made a group of HDF5's."""
    for name in group:
        if group.links.get_info(name).type == h5py.h5l.TYPE_EXTERNAL:
            continue
        item = h5py.h5o.open(group, name)
        if isinstance(item, h5py.h5g.GroupID):
            yield from _places(item, prefix + name + b"/")
        else:
            key, shape = (prefix + name).decode(), item.shape
            start = 0 if 0 in shape else item.get_offset()
            if start is None:
                raise ValueError(f"{key} is not contiguous: not written by this program")
            yield key, Place(_dtype(item.get_type().encode()), shape, start)


@lru_cache(256)
def _dtype(kind: bytes) -> str:
    """Of HDF5's description of a type; a file has hundreds of arrays and few types."""
    return str(h5py.h5t.decode(kind).dtype.str)


def _attributes(item: Any) -> dict[str, Scalar]:
    """Attributes as Python scalars instead of numpy's."""
    return {
        key: value.item() if isinstance(value, np.generic) else str(value)
        for key, value in item.attrs.items()
    }


def _hash_attributes(hasher: xxh3_128, path: str, values: Mapping[str, Scalar]) -> None:
    for key in sorted(values):
        value = values[key]
        match value:
            case bool():
                kind, data = "bool", struct.pack("<?", value)
            case int():
                kind, data = "int", struct.pack("<q", value)
            case float():
                kind, data = "float", struct.pack("<d", value)
            case _:
                kind, data = "str", str(value).encode()
        _hash(hasher, f"{path}@{key}", kind, data)


def _hash(hasher: xxh3_128, path: str, kind: str, data: bytes) -> None:
    for part in (path.encode(), kind.encode(), data):
        hasher.update(struct.pack("<Q", len(part)))
        hasher.update(part)
