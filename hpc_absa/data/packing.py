"""Writing the packed form of a data set (`packed.py`), complete or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_absa.data.packed import (
    FORMAT,
    PackedDataset,
    check_replaceable,
    header,
    open_packed,
)
from hpc_absa.data.sources import Source
from hpc_absa.errors import HpcAbsaError, first_line
from hpc_absa.hdf5 import MemoryFile, reserve, write_at
from hpc_absa.rundir.files import replacing

PIXELS_VERSION = 1
"""Format version of files with pixels."""

Progress = Callable[[int, int], None]
"""Called with the images done and the images in total."""

LAYOUT: dict[str, Any] = {
    "libver": ("v110", "v110"),  # its metadata have checksums; HDF5 1.10 and later read it
    "alignment_threshold": 1,
    "alignment_interval": 64,  # bytes: of every array within the file, so that it can be mapped
}


def write_packed(
    path: Path,
    source: Source,
    name: str,
    arguments: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> PackedDataset:
    """Pack `source` into `path`, which appears complete or not at all; returns it opened.

    Images are written in blocks: memory use does not grow with the data set. The file contains
    `name` and `arguments` of the source. An older packed file is replaced.

    Raises:
        HpcAbsaError: The disk is full or cannot be written; nothing is left behind.
        UsageError: The source's images are not what it declares, or `path` is not a packed file.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, durable=True) as temporary, temporary.open("xb", 0) as file:
            image = MemoryFile()
            with h5py.File(image, "w", **LAYOUT) as layout:
                layout.attrs["format"] = fixed_text(FORMAT)
                layout.attrs["format_version"] = PIXELS_VERSION
                layout.attrs["name"] = fixed_text(name)
                layout.attrs["arguments"] = fixed_text(json.dumps(arguments or {}, sort_keys=True))
                layout["classes"] = fixed_text(source.classes)
                _write_arrays(file.fileno(), layout, source, progress)
            image.write_to(file.fileno())
            check_replaceable(path)  # again, because packing takes long
    except OSError as error:
        raise HpcAbsaError(
            f"{path}: cannot be written ({first_line(error)}); the packed data set needs "
            f"{source.nbytes / 1e6:.1f} MB there"
        ) from error
    return open_packed(path)


def _write_arrays(
    descriptor: int, layout: h5py.File, source: Source, progress: Progress | None
) -> None:
    """Images and labels, and the attributes that depend on them: mean, std and digest."""
    digest = hashlib.sha256()
    moments = _Moments(source.train.shape[0])
    done, total = 0, len(source.train) + len(source.test)
    for part, samples in (("train", source.train), ("test", source.test)):
        images_shape = (len(samples), *samples.shape)
        offset = reserve(layout.id, f"{part}/images", samples.dtype, images_shape)
        labels = reserve(layout.id, f"{part}/labels", samples.labels.dtype, samples.labels.shape)
        for block in samples.blocks():
            data = block.data.cast("B")
            write_at(descriptor, data, offset)
            offset += len(data)
            digest.update(data)
            if part == "train" and block.dtype == np.uint8:
                moments.add(block)
            done += len(block)
            if progress:
                progress(done, total)
        data = samples.labels.data.cast("B")
        write_at(descriptor, data, labels)
        digest.update(data)
    mean, std = moments.mean_std()
    mean = mean if source.mean is None else source.mean
    std = std if source.std is None else source.std
    digest.update(header(source.train, source.test, source.classes, mean, std))
    notes = json.dumps(dict(source.notes))
    layout.attrs.update(
        mean=mean, std=std, digest=fixed_text(digest.hexdigest()), notes=fixed_text(notes)
    )


def moments_of(
    blocks: Iterable[NDArray[np.uint8]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation [C] of images in blocks [k, C, H, W], in pixel units."""
    moments = None
    for block in blocks:
        moments = moments or _Moments(block.shape[1])
        moments.add(block)
    assert moments is not None
    return moments.mean_std()


class _Moments:
    """Exact sums of pixels and of their squares: the mean does not depend on the block size."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sums = [0] * channels
        self.squares = [0] * channels

    def add(self, block: NDArray[np.uint8]) -> None:
        """Add images [k, C, H, W]."""
        self.count += block[:, 0].size
        for channel in range(block.shape[1]):
            counts = np.bincount(block[:, channel].ravel(), minlength=256)
            self.sums[channel] += int(counts @ np.arange(256))
            self.squares[channel] += int(counts @ np.arange(256) ** 2)

    def mean_std(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[C] each, of pixels in [0, 1], a constant channel with std 1; 0 and 1 without images."""
        if not self.count:
            return np.zeros(len(self.sums)), np.ones(len(self.sums))
        mean = [total / self.count for total in self.sums]
        squares = np.array([total / self.count for total in self.squares])
        std = np.sqrt(np.maximum(0.0, squares - np.square(mean))) / 255.0
        return np.array(mean) / 255.0, np.where(std > 0.0, std, 1.0)


def fixed_text(value: str | Sequence[str]) -> NDArray[Any]:
    """Strings of fixed length in HDF5's UTF-8.

    Those of variable length are in a heap without a checksum, and one flipped bit in it can make
    the library read in an endless loop.
    """
    encoded = np.char.encode(np.asarray(value, np.str_), "utf-8")
    length = max(1, encoded.dtype.itemsize)
    return encoded.astype(h5py.string_dtype("utf-8", length))
