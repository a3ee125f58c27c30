"""What a checkpoint holds, independent of the files it lies in (`docs/checkpoint-format.md`)."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

FORMAT = "hpc-absa"
FORMAT_VERSION = 2

Scalar = int | float | str | bool

Key = tuple[str, str]
"""An array's group and name."""


@dataclass(frozen=True)
class Group:
    """A named part of the content: scalars as attributes, arrays as data sets."""

    attributes: Mapping[str, Scalar] = field(default_factory=dict)
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Fingerprint:
    """An array that lies elsewhere: all that the digest wants to know of it."""

    dtype: str
    """numpy's `dtype.str`."""
    shape: tuple[int, ...]
    sha256: bytes
    """SHA-256 of its bytes in C order."""

    @classmethod
    def of(cls, array: np.ndarray) -> Fingerprint:
        """The fingerprint of an array in memory."""
        return cls(array.dtype.str, array.shape, hashlib.sha256(raw(array)).digest())


@dataclass(frozen=True)
class Content:
    """Everything that one checkpoint says."""

    attributes: Mapping[str, Scalar]
    """Root attributes: epoch, step, samples, world_size, global_batch."""
    groups: Mapping[str, Group]
    """`model`, `optimizer`, `schedule`, `data`, `rng`, `curvature`, `job`, `versions`."""

    def arrays(self) -> dict[Key, np.ndarray]:
        """All arrays by group and name, in the order of the digest."""
        return {
            (name, key): self.groups[name].arrays[key]
            for name in sorted(self.groups)
            for key in sorted(self.groups[name].arrays)
        }

    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def fingerprints(self) -> dict[Key, Fingerprint]:
        """Of all arrays."""
        return {key: Fingerprint.of(array) for key, array in self.arrays().items()}

    def digest(self, fingerprints: Mapping[Key, Fingerprint] | None = None) -> str:
        """SHA-256 over the content in a fixed order, whatever way HDF5 lays it out.

        The hash runs over one record for each group, attribute and array, in order of their names:
        path, kind, and value with their lengths, so that no two contents share a byte stream. An
        array's value is the SHA-256 of its bytes, so that ranks may hash a share each.

        Args:
            fingerprints: of all arrays, where they are known already or lie elsewhere.
        """
        known = self.fingerprints() if fingerprints is None else fingerprints
        hasher = hashlib.sha256()
        _hash_attributes(hasher, "/", self.attributes)
        for name in sorted(self.groups):
            _hash(hasher, f"/{name}", "group", b"")
            _hash_attributes(hasher, f"/{name}", self.groups[name].attributes)
            for group, key in sorted(known):
                if group == name:
                    found = known[group, key]
                    kind = f"array {found.dtype} {list(found.shape)}"
                    _hash(hasher, f"/{name}/{key}", kind, found.sha256)
        return f"sha256:{hasher.hexdigest()}"


def raw(array: np.ndarray) -> memoryview:
    """The bytes of an array in C order, without a copy where it lies so already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


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


def _hash(hasher: hashlib._Hash, path: str, kind: str, data: bytes) -> None:
    for part in (path.encode(), kind.encode(), data):
        hasher.update(struct.pack("<Q", len(part)))
        hasher.update(part)
