"""How a checkpoint file is laid out in HDF5: the only module here that imports h5py.

HDF5 keeps names, types and attributes, and says where the bytes of arrays belong; `file` writes and
reads those itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpc_absa.checkpoint.schema import (
    FORMAT,
    FORMAT_VERSION,
    Content,
    Fingerprint,
    Key,
    Scalar,
)
from hpc_absa.errors import CheckpointError

RESERVED = ("format", "format_version", "created", "digest")
"""Root attributes that describe the file, not the content; the digest leaves them out."""


SHARDS = "shards"
"""The group whose attributes name the shards."""

SHARD = "shard"
"""The root attribute with which a shard says its number: it is no checkpoint by itself."""


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


def lay_out(
    path: Path, content: Content, shards: tuple[Shard, ...], block: int
) -> dict[Key, Place]:
    """Make the file with everything but the arrays' bytes; says where those belong."""
    with h5py.File(path, "w", locking=False, userblock_size=block) as file:
        file.attrs.update(format=FORMAT, format_version=FORMAT_VERSION, created=time.time())
        file.attrs.update(content.attributes)
        groups = {name: file.create_group(name) for name in content.groups}
        for name, group in content.groups.items():
            groups[name].attrs.update(group.attributes)
        place = _Placer()
        places = {
            (name, key): place(groups[name].id, key, array)
            for (name, key), array in content.arrays().items()
        }
        if shards:
            file.create_group(SHARDS).attrs.update({s.name: s.digest for s in shards})
        for shard in shards:
            for name, key in shard.fingerprints:
                file[f"{name}/{key}"] = h5py.ExternalLink(shard.name, f"/{name}/{key}")
    return places


class _Placer:
    """Creates data sets whose bytes have their place in the file from the beginning.

    In HDF5's own calls: h5py's convenience takes three times as long for a model's many arrays.
    """

    def __init__(self) -> None:
        self._settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        self._settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        self._settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        self._links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        self._links.set_create_intermediate_group(True)
        self._links.set_char_encoding(h5py.h5t.CSET_UTF8)

    def __call__(self, group: Any, key: str, array: np.ndarray) -> Place:
        shape = array.shape
        space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
        kind = h5py.h5t.py_create(array.dtype, logical=True)
        made = h5py.h5d.create(group, None, kind, space, self._settings)
        h5py.h5o.link(made, group, key.encode(), lcpl=self._links)
        return Place(array.dtype.str, shape, made.get_offset() if array.nbytes else 0)


def sign(path: Path, digest: str) -> None:
    """Put the digest into a file that has everything else."""
    with h5py.File(path, "r+", locking=False) as file:
        file.attrs["digest"] = digest


def outline(path: Path) -> Outline:
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
        found = {(name, key): item for name in groups for key, item in _data_sets(file[name].id)}
        places = {key: _placed(item) for key, item in found.items()}
        return Outline(
            path.name,
            {k: v for k, v in _attributes(file).items() if k not in RESERVED},
            groups,
            {key: place for key, place in places.items() if place},
            str(file.attrs["digest"]),
            {k: str(v) for k, v in sorted(file[SHARDS].attrs.items())} if SHARDS in file else {},
            {
                key: np.asarray(h5py.Dataset(found[key])[()])
                for key, place in places.items()
                if not place
            },
        )


def _data_sets(group: Any, prefix: bytes = b"") -> Iterator[tuple[str, Any]]:
    """Names and data sets in this file; HDF5 made groups of the slashes that a name had."""
    for name in group:
        if group.links.get_info(name).type == h5py.h5l.TYPE_EXTERNAL:
            continue
        item = h5py.h5o.open(group, name)
        if isinstance(item, h5py.h5g.GroupID):
            yield from _data_sets(item, prefix + name + b"/")
        else:
            yield (prefix + name).decode(), item


def _placed(item: Any) -> Place | None:
    """Where the bytes lie, None where they do not lie in one piece."""
    place = Place(item.dtype.str, item.shape, 0)
    if not place.nbytes:
        return place
    start = item.get_offset()
    return None if start is None else replace(place, start=start)


def _attributes(place: Any) -> dict[str, Scalar]:
    """Attributes as Python scalars: HDF5 gives numpy's."""
    return {
        key: value.item() if isinstance(value, np.generic) else str(value)
        for key, value in place.attrs.items()
    }
