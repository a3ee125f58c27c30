"""The packed form of a data set: one HDF5 file that all ranks map into memory.

Layout (`docs/data.md`): contiguous data sets `/train/images`, `/train/labels`, `/test/images`,
`/test/labels`, the names `/classes`, and root attributes. The ranks of a node share the pages of
the file, so a data set is in a node's memory once, for any number of ranks, and only as far as it
was read. `packing.py` writes the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpc_absa.data.encoded import EncodedImages
from hpc_absa.data.sources import Samples, Source
from hpc_absa.errors import HpcAbsaError, UsageError, first_line

FORMAT = "hpc-absa-data"
FORMAT_VERSION = 2
"""The newest that is read; files with pixels have version 1."""


@dataclass(frozen=True)
class Split:
    """Training or test samples, mapped from the file and read-only."""

    images: Any
    """uint8 [N, C, H, W] for images, float32 [N, C, ...] for other data: an array, or
    `encoded.EncodedImages`."""
    labels: NDArray[Any]
    """Classes int64 [N], from 0; or targets float32 [N] or [N, L]."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class PackedDataset:
    """An open packed data set; its arrays are read from the disk on access."""

    name: str
    """The source it was packed from: `digits`, `cifar10`, `package.module:function`, ..."""
    arguments: dict[str, Any]
    """The arguments of the source, without `root`."""
    train: Split
    test: Split
    classes: tuple[str, ...]
    mean: NDArray[np.float64]
    """[C], of the training pixels, in pixel units (0 black, 1 white); 0 for float data."""
    std: NDArray[np.float64]
    """[C] likewise; 1 for float data."""
    digest: str
    """SHA-256 over the content, in hexadecimal."""
    path: Path
    notes: dict[str, int] = field(default_factory=dict)
    """What was left out or converted when it was packed, and how often."""

    @property
    def is_image(self) -> bool:
        """Whether samples are images (uint8), which can be cropped, flipped and attacked."""
        return self.train.images.dtype == np.uint8

    @property
    def is_encoded(self) -> bool:
        """Whether the file has images as they were encoded, of different sizes."""
        return isinstance(self.train.images, EncodedImages)

    @property
    def offered(self) -> dict[str, int]:
        """What a model's builder may take."""
        offered = {"channels": self.channels, "image_size": self.image_size}
        return offered | ({"classes": len(self.classes)} if self.classes else {})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W), or (F,) for feature vectors."""
        return self.train.images.shape[1:]

    @property
    def channels(self) -> int:
        """C; the number of features where a sample is a vector."""
        return self.shape[0]

    @property
    def image_size(self) -> int:
        """H in pixels; 1 where a sample is a vector."""
        return self.shape[1] if len(self.shape) > 1 else 1


def open_packed(path: Path) -> PackedDataset:
    """Map a packed data set; takes milliseconds at any size.

    Raises:
        UsageError: No such file, not a packed data set, or one of a newer version.
        HpcAbsaError: Truncated or otherwise damaged.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no packed data set here; make one with `hpc-absa data`")
    if not h5py.is_hdf5(path):
        raise UsageError(
            f"{path}: not an HDF5 file, expected a data set packed by `hpc-absa data`; pack the "
            "data into another file with --out, and give that as data.root"
        )
    try:
        # No process writes a packed file in place, and many network file systems refuse locks.
        with h5py.File(path, "r", locking=False) as file:
            return _read(file, path)
    except (OSError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise HpcAbsaError(f"{path}: damaged ({first_line(error)}); pack it again") from error


def is_packed(path: Path) -> bool:
    try:
        with h5py.File(path, "r", locking=False) as file:
            return text(file.attrs.get("format", b"")) == FORMAT
    except Exception:  # h5py raises errors of many types for files that it cannot read
        return False


def check_replaceable(path: Path) -> None:
    """Raise a UsageError if `path` exists and is not a packed data set."""
    if os.path.lexists(path) and not is_packed(path):
        raise UsageError(
            f"{path}: exists, and is not a data set packed by hpc-absa; "
            "remove it, or name another file with --out"
        )


def header(
    train: Split | Samples,
    test: Split | Samples,
    classes: Sequence[str],
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
) -> bytes:
    """What the digest covers besides the arrays: their meaning."""
    description = {
        "samples": [len(train), len(test)],
        "classes": list(classes),
        "mean": [float(value).hex() for value in mean],
        "std": [float(value).hex() for value in std],
    }
    return json.dumps(description, sort_keys=True).encode()


def text(value: Any) -> str:
    """A string of HDF5, which is bytes if its length is fixed."""
    return value.decode("utf-8") if isinstance(value, bytes) else str(value)


def _read(file: h5py.File, path: Path) -> PackedDataset:
    if text(file.attrs.get("format", b"")) != FORMAT:
        raise UsageError(
            f"{path}: an HDF5 file, but not a data set packed by `hpc-absa data`; pack the data "
            "into another file with --out, and give that as data.root"
        )
    version = int(file.attrs["format_version"])
    if version > FORMAT_VERSION:
        raise UsageError(
            f"{path}: packed in format version {version}, this hpc-absa reads up to "
            f"{FORMAT_VERSION}; update hpc-absa or pack it again"
        )
    notes = json.loads(text(file.attrs["notes"])) if "notes" in file.attrs else None
    split = _encoded if "encoding" in file.attrs else _pixels
    dataset = PackedDataset(
        name=text(file.attrs["name"]),
        arguments=json.loads(text(file.attrs["arguments"])),
        train=split(file["train"], path),
        test=split(file["test"], path),
        classes=tuple(text(name) for name in file["classes"][()]),
        mean=np.asarray(file.attrs["mean"], np.float64),
        std=np.asarray(file.attrs["std"], np.float64),
        digest=text(file.attrs["digest"]),
        path=path,
        notes=notes or {},
    )
    return dataset if dataset.is_encoded else _checked(dataset, read_all=notes is None)


def _pixels(group: h5py.Group, path: Path) -> Split:
    return Split(_mapped(group["images"], path), _mapped(group["labels"], path))


def _encoded(group: h5py.Group, path: Path) -> Split:
    encoding = text(group.file.attrs["encoding"])
    if encoding != "files":
        raise ValueError(f"its images have the encoding {encoding!r}, expected 'files'")
    data, labels = _mapped(group["encoded"], path), _mapped(group["labels"], path)
    starts, lengths, sizes = (_mapped(group[k], path) for k in ("starts", "lengths", "sizes"))
    if not len(labels) == len(starts) == len(lengths) == len(sizes):
        raise ValueError(f"{group.name}: index and labels have different lengths")
    if (starts + lengths).max() > len(data):
        raise ValueError(f"{group.name}: an image is outside of the data")
    image_size = int(group.file.attrs["image_size"])
    return Split(EncodedImages(data, starts, lengths, sizes, image_size, path), labels)


def _mapped(dataset: h5py.Dataset, path: Path) -> NDArray[Any]:
    """The bytes of a contiguous HDF5 data set as an array over the file itself."""
    offset = dataset.id.get_offset()
    if offset is None:
        raise ValueError(f"{dataset.name} is not stored contiguously")
    mapped = np.memmap(path, dtype=dataset.dtype, mode="r", offset=offset, shape=dataset.shape)
    # A plain array over the same memory: the subclass costs time at every index operation.
    return mapped.view(np.ndarray)


def _checked(dataset: PackedDataset, read_all: bool) -> PackedDataset:
    """After the checks of every source; `read_all`: also of values, in files that lack them."""
    for name, split in (("train", dataset.train), ("test", dataset.test)):
        types = split.labels.dtype, split.images.dtype
        if types[0] not in (np.int64, np.float32) or types[1] not in (np.uint8, np.float32):
            raise ValueError(
                f"/{name} has labels {types[0]} and images {types[1]}, expected int64 or float32, "
                "and uint8 or float32"
            )
    train, test = (
        Samples.from_arrays(split.images, split.labels, part)
        for part, split in (("train", dataset.train), ("test", dataset.test))
    )
    try:
        source = Source(train, test, dataset.classes, dataset.mean, dataset.std)
        for samples in (source.train, source.test) if read_all and not dataset.is_image else ():
            for _ in samples.blocks():
                pass
    except UsageError as error:
        raise ValueError(str(error)) from error
    assert source.std is not None
    return replace(dataset, std=source.std)
