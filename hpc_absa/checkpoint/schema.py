"""What a checkpoint holds, independent of the file it lies in (`docs/checkpoint-format.md`)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

FORMAT = "hpc-absa"
FORMAT_VERSION = 1

Scalar = int | float | str | bool


@dataclass(frozen=True)
class Group:
    """A named part of the content: scalars as attributes, arrays as data sets."""

    attributes: Mapping[str, Scalar] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Content:
    """Everything that one checkpoint says."""

    attributes: Mapping[str, Scalar]
    """Root attributes: epoch, step, samples, world_size, global_batch."""
    groups: Mapping[str, Group]
    """`model`, `optimizer`, `schedule`, `data`, `rng`, `curvature`, `job`, `versions`."""

    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for group in self.groups.values() for a in group.arrays.values())

    def digest(self) -> str:
        """SHA-256 over the content in a fixed order, whatever way HDF5 lays it out.

        The hash runs over one record for each group, attribute and array, in order of their names:
        path, kind, and value with their lengths, so that no two contents share a byte stream.
        """
        hasher = hashlib.sha256()
        _hash_attributes(hasher, "/", self.attributes)
        for name in sorted(self.groups):
            group = self.groups[name]
            _hash(hasher, f"/{name}", "group", b"")
            _hash_attributes(hasher, f"/{name}", group.attributes)
            for key in sorted(group.arrays):
                array = group.arrays[key]
                kind = f"array {array.dtype.str} {list(array.shape)}"
                flat = np.ascontiguousarray(array).reshape(-1)
                _hash(hasher, f"/{name}/{key}", kind, flat.view(np.uint8).data)
        return f"sha256:{hasher.hexdigest()}"


def _hash_attributes(hasher: hashlib._Hash, path: str, values: Mapping[str, Scalar]) -> None:
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


def _hash(hasher: hashlib._Hash, path: str, kind: str, data: bytes | memoryview) -> None:
    for part in (path.encode(), kind.encode(), data):
        hasher.update(struct.pack("<Q", len(part)))
        hasher.update(part)
