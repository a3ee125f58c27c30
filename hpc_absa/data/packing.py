"""Writing the packed form of a data set (`packed.py`), image after image, all or nothing.

HDF5 never touches the disk here. Where a write fails, as on a full disk, its library cannot close
the file any more and the process crashes when it ends (HDF5 1.14, h5py 3.16). So HDF5 lays out the
metadata in memory, the images go to their places by plain writes, which fail cleanly, and the
metadata follows once mean and digest are known.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_absa.data.content import Samples, Source
from hpc_absa.data.packed import (
    FORMAT,
    FORMAT_VERSION,
    SPLITS,
    PackedDataset,
    header,
    one_line,
    open_packed,
)
from hpc_absa.errors import HpcAbsaError, UsageError

Progress = Callable[[int, int], None]
"""Called with the images done and the images in total."""

_FORMAT_OF_HDF5 = ("v110", "v110")  # its metadata carry checksums; HDF5 1.10 and later read it
_ALIGNMENT = 64  # bytes: of every array within the file, so that it can be mapped as it is


def write_packed(
    path: Path,
    source: Source,
    name: str,
    arguments: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> PackedDataset:
    """Pack `source` into `path`, which appears complete or not at all; returns it opened.

    Images pass through in blocks: memory use does not grow with the data set.

    Args:
        path: Its folder is made where it does not exist; a file there is replaced.
        source: What to pack.
        name: Of the source, kept in the file.
        arguments: What the source was made with, kept in the file; must go into JSON.
        progress: Called after every block.

    Raises:
        HpcAbsaError: The disk is full or cannot be written; nothing is left behind.
        UsageError: The source's images are not what it announced.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _replacing(path) as file:
            _write(file, source, {"name": name, "arguments": arguments or {}}, progress)
    except OSError as error:
        raise HpcAbsaError(
            f"{path}: cannot be written ({one_line(error)}); the packed data set needs "
            f"{source.nbytes / 1e6:.1f} MB there"
        ) from error
    return open_packed(path)


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path`; moved there if all goes well, removed if anything does not.

    Its name is this process's own, so that two that pack the same data set at once do not mix.
    """
    partial = path.with_name(f"{path.stem}.{uuid.uuid4().hex[:8]}.h5.tmp")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(FileNotFoundError):
            partial.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(
    file: BinaryIO, source: Source, labels: dict[str, Any], progress: Progress | None
) -> None:
    """Images and labels to the places that the metadata names, then the metadata itself."""
    channels = source.train.shape[0]
    blank = np.zeros(channels)
    _, offsets = _metadata(source, labels, blank, blank, digest="0" * 64)
    digest = hashlib.sha256()
    moments = _Moments(channels)
    done, total = 0, len(source.train) + len(source.test)
    for part, samples in zip(SPLITS, (source.train, source.test), strict=True):
        file.seek(offsets[f"{part}/images"])
        for block in _checked(samples, part):
            file.write(block.data)
            digest.update(block.data)
            if part == "train":
                moments.add(block)
            done += len(block)
            if progress:
                progress(done, total)
        file.seek(offsets[f"{part}/labels"])
        file.write(samples.labels.data)
        digest.update(samples.labels.data)
    mean, std = _normalisation(source, moments)
    digest.update(header(source.train, source.test, source.classes, mean, std))
    metadata, again = _metadata(source, labels, mean, std, digest.hexdigest())
    assert again == offsets, "the layout depends on sizes alone"
    metadata.write_to(file)


def _checked(samples: Samples, part: str) -> Iterator[NDArray[Any]]:
    """The blocks, contiguous, after making sure that they are what the source announced."""
    seen = 0
    for block in samples.blocks():
        if block.shape[1:] != samples.shape or block.dtype != samples.dtype:
            raise UsageError(
                f"{part} images come as {block.dtype} {list(block.shape[1:])}, but "
                f"{samples.dtype} {list(samples.shape)} was announced"
            )
        seen += len(block)
        if seen > len(samples):
            break
        yield np.ascontiguousarray(block)
    if seen != len(samples):
        counted = "more" if seen > len(samples) else seen
        raise UsageError(f"the {part} set has {len(samples)} labels but {counted} images")


class _Moments:
    """Exact sums of pixels and of their squares: the mean does not depend on the block size."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sums = [0] * channels
        self.squares = [0] * channels

    def add(self, block: NDArray[Any]) -> None:
        """Count in uint8 images [k, C, H, W]; other data has no use for it."""
        if block.dtype != np.uint8:
            return
        self.count += block[:, 0].size
        for channel in range(block.shape[1]):
            counts = np.bincount(block[:, channel].ravel(), minlength=256)
            self.sums[channel] += int(counts @ np.arange(256))
            self.squares[channel] += int(counts @ np.arange(256) ** 2)

    def mean_std(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[C] each, of pixels in [0, 1]; a constant channel has std 1, not 0."""
        mean = [total / self.count for total in self.sums]
        squares = np.array([total / self.count for total in self.squares])
        std = np.sqrt(np.maximum(0.0, squares - np.square(mean))) / 255.0
        return np.array(mean) / 255.0, np.where(std > 0.0, std, 1.0)


def _normalisation(
    source: Source, moments: _Moments
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What the source gives, else what was measured, else (for float data) nothing at all."""
    channels = source.train.shape[0]
    mean, std = moments.mean_std() if moments.count else (np.zeros(channels), np.ones(channels))
    return (
        mean if source.mean is None else source.mean,
        std if source.std is None else source.std,
    )


def _metadata(
    source: Source,
    labels: dict[str, Any],
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    digest: str,
) -> tuple[_SparseFile, dict[str, int]]:
    """All of the HDF5 file but the arrays' content, and the offset in bytes of each array."""
    sparse = _SparseFile()
    with h5py.File(
        sparse,
        "w",
        libver=_FORMAT_OF_HDF5,
        alignment_threshold=1,
        alignment_interval=_ALIGNMENT,
    ) as file:
        file.attrs["format"] = _text(FORMAT)
        file.attrs["format_version"] = FORMAT_VERSION
        file.attrs["name"] = _text(labels["name"])
        file.attrs["arguments"] = _text(json.dumps(labels["arguments"], sort_keys=True))
        file.attrs["mean"] = mean
        file.attrs["std"] = std
        file.attrs["digest"] = _text(digest)
        file.create_dataset("classes", data=_text(source.classes))
        offsets = {}
        for part, samples in zip(SPLITS, (source.train, source.test), strict=True):
            group = file.create_group(part)
            offsets[f"{part}/labels"] = _reserve(group, "labels", (len(samples),), np.dtype("i8"))
            shape = (len(samples), *samples.shape)
            offsets[f"{part}/images"] = _reserve(group, "images", shape, samples.dtype)
    return sparse, offsets


class _SparseFile(io.RawIOBase):
    """A file in memory that keeps what was written and not the gaps, however large they are."""

    def __init__(self) -> None:
        self._writes: list[tuple[int, bytes]] = []
        self._size = self._position = 0

    def write_to(self, file: BinaryIO) -> None:
        """Repeat the writes in `file`, in their order, and give it this one's length."""
        for offset, data in self._writes:
            file.seek(offset)
            file.write(data)
        file.truncate(self._size)

    def write(self, data: Any) -> int:
        """Keep `data` for the present position."""
        self._writes.append((self._position, bytes(data)))
        self._position += len(data)
        self._size = max(self._size, self._position)
        return len(data)

    def readinto(self, buffer: Any) -> int:
        """Zeros, and over them what was written there."""
        start, stop = self._position, min(self._position + len(buffer), self._size)
        buffer[:] = bytes(len(buffer))
        for offset, data in self._writes:
            low, high = max(start, offset), min(stop, offset + len(data))
            if low < high:
                buffer[low - start : high - start] = data[low - offset : high - offset]
        self._position = max(start, stop)
        return max(0, stop - start)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to `offset`; HDF5 also asks for the end."""
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position}.get(
            whence, self._size
        )
        return self._position

    def tell(self) -> int:
        """The present position."""
        return self._position

    def truncate(self, size: int | None = None) -> int:
        """Set the length."""
        self._size = self._position if size is None else size
        return self._size

    def seekable(self) -> bool:
        """Yes."""
        return True


def _text(words: str | Sequence[str]) -> NDArray[Any]:
    """Strings of fixed length in HDF5's UTF-8.

    Those of variable length lie in a heap without a checksum, and one flipped bit in it can make
    the library read in circles for ever.
    """
    encoded = np.char.encode(np.asarray(words, np.str_), "utf-8")
    length = max(1, encoded.dtype.itemsize)
    return encoded.astype(h5py.string_dtype("utf-8", length))


def _reserve(group: h5py.Group, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """A contiguous data set whose place is fixed now and whose bytes HDF5 leaves alone."""
    plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plan.set_layout(h5py.h5d.CONTIGUOUS)
    plan.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plan.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    kind = h5py.h5t.py_create(dtype, logical=True)
    dataset = h5py.h5d.create(
        group.id, name.encode(), kind, h5py.h5s.create_simple(shape), dcpl=plan
    )
    return int(dataset.get_offset())
