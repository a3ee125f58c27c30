"""Files that HDF5 lays out and whose arrays are written past it, by plain writes.

Plain writes run at the disk's speed and fail cleanly. HDF5 itself does not: after a failed write,
as on a full disk, its library cannot close the file and crashes when the process exits (HDF5 2.0,
h5py 3.16).
"""

from __future__ import annotations

import io
import os
from functools import cache
from typing import Any

import h5py
import numpy as np


class DeferredErrorFile(io.FileIO):
    """A file to give to `h5py.File`; keeps the first error of a write instead of raising it."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        start = self.tell()
        try:
            write_at(self.fileno(), view, start)
        except OSError as error:
            self.error = self.error or error
        self.seek(start + len(view))
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        size = self.tell() if size is None else size
        try:
            os.ftruncate(self.fileno(), size)
        except OSError as error:
            self.error = self.error or error
        return size

    def check(self) -> None:
        """Raise the kept error; to be called after HDF5 has closed the file."""
        if self.error:
            raise self.error


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
    creation, links = _property_lists()
    space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
    kind = h5py.h5t.py_create(dtype, logical=True)
    dataset = h5py.h5d.create(group, None, kind, space, creation)
    h5py.h5o.link(dataset, group, key.encode(), lcpl=links)
    return int(dataset.get_offset()) if 0 not in shape else 0


@cache
def _property_lists() -> tuple[Any, Any]:
    """Made once and used by low-level calls: h5py's convenience takes three times as long."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
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
