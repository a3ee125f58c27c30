"""Files that HDF5 lays out and whose arrays are written past it, by plain writes.

Plain writes run at the disk's speed and fail cleanly. HDF5 itself does not: after a failed write,
as on a full disk, its library cannot close the file and crashes when the process exits (HDF5 2.0,
h5py 3.16).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable
from functools import cache, lru_cache
from typing import Any

import h5py
import numpy as np


class MemoryFile(io.RawIOBase):
    """What HDF5 writes, kept in memory: a file to give to `h5py.File`."""

    def __init__(self) -> None:
        self.writes: list[tuple[int, bytes]] = []
        """Offset and bytes of each, in the order in which HDF5 made them."""
        self.size = self._at = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def write(self, data: Any, /) -> int:
        self.writes.append((self._at, bytes(data)))
        self._at += len(self.writes[-1][1])
        self.size = max(self.size, self._at)
        return len(self.writes[-1][1])

    def readinto(self, buffer: Any, /) -> int:
        into, start = memoryview(buffer).cast("B"), self._at
        into[:] = bytes(len(into))
        for at, data in self.writes:
            low, high = max(at, start), min(at + len(data), start + len(into))
            if low < high:
                into[low - start : high - start] = data[low - at : high - at]
        self._at += len(into)
        return len(into)

    def truncate(self, size: int | None = None, /) -> int:
        self.size = self._at if size is None else size
        return self.size

    def write_to(self, descriptor: int) -> None:
        """Write it all to a file; OSError where that fails."""
        os.ftruncate(descriptor, self.size)
        for start, data in self.writes:
            write_at(descriptor, memoryview(data), start)


def reserve(group: Any, key: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    """Create a contiguous data set whose bytes the caller writes.

    Args:
        group: The `h5py.h5g.GroupID` that it belongs to.
        key: Its name; the groups of a path with slashes are created.
        dtype: Of the elements.
        shape: May be `()` or contain 0.

    Returns:
        Its offset in the file in bytes; 0 where it has no bytes.
    """
    return _offset(_create(group, key, dtype, shape, h5py.h5d.ALLOC_TIME_EARLY), shape)


Array = tuple[Any, str, np.dtype[Any], tuple[int, ...]]
"""The arguments of `reserve`."""


def reserve_together(arrays: Iterable[Array]) -> list[int]:
    """`reserve` for all arrays of a `MemoryFile`, whose bytes then follow on each other.

    HDF5 allocates an array's bytes with its header, or when the first element is written: here
    after all headers. So whoever reads the file from its beginning knows early what comes.
    """
    late = h5py.h5d.ALLOC_TIME_LATE
    created = [(_create(*array, late), *array[2:]) for array in arrays]
    for dataset, dtype, shape in created:
        if 0 not in shape:
            dataset.write(_space((1,)), _first(shape), np.zeros(1, dtype), _kind(dtype))
    return [_offset(dataset, shape) for dataset, _, shape in created]


def _create(group: Any, key: str, dtype: np.dtype[Any], shape: tuple[int, ...], when: int) -> Any:
    return h5py.h5d.create(group, key.encode(), _kind(dtype), _space(shape), *_property_lists(when))


def _offset(dataset: Any, shape: tuple[int, ...]) -> int:
    return int(dataset.get_offset()) if 0 not in shape else 0


@lru_cache(256)
def _kind(dtype: np.dtype[Any]) -> Any:
    return h5py.h5t.py_create(dtype, logical=True)


@lru_cache(4096)
def _space(shape: tuple[int, ...]) -> Any:
    return h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)


@lru_cache(4096)
def _first(shape: tuple[int, ...]) -> Any:
    """The first element."""
    first = _space(shape).copy()
    if shape:
        first.select_hyperslab((0,) * len(shape), (1,) * len(shape))
    return first


@cache
def _property_lists(allocation_time: int) -> tuple[Any, Any]:
    """Made once and used by low-level calls: h5py's convenience takes three times as long."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(allocation_time)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    creation.set_obj_track_times(False)  # so that equal contents are equal files
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    links.set_char_encoding(h5py.h5t.CSET_UTF8)
    return creation, links


def write_at(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data` (bytes) at `offset`; OSError where that fails, as on a full disk."""
    while data:  # a write that is cut short is followed by one that reports why
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
