"""What a data set consists of before it is packed, and how a job's `[data]` table names one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpc_absa import plugins
from hpc_absa.data.registry import DATASETS
from hpc_absa.errors import UsageError

_BLOCK_BYTES = 1 << 24  # of an array at a time: large enough for the disk, small in memory


@dataclass(frozen=True)
class Samples:
    """N training or test samples; images come in blocks, in the order of the labels."""

    labels: NDArray[np.int64]
    """[N], from 0 up to the number of classes."""
    shape: tuple[int, ...]
    """Of one sample: (C, H, W) for images, (F,) or (C, ...) for other data."""
    dtype: np.dtype[Any]
    """uint8 for images, float32 for other data."""
    blocks: Callable[[], Iterator[NDArray[Any]]]
    """Yields arrays [k, *shape], k ≥ 1, N samples in total."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return len(self) * prod(self.shape) * self.dtype.itemsize

    @classmethod
    def from_arrays(cls, images: ArrayLike, labels: ArrayLike, part: str = "train") -> Samples:
        """Samples that are in memory.

        Args:
            images: uint8 [N, C, H, W], or floating-point [N, F] or [N, C, ...], kept as float32.
            labels: Integers [N].
            part: For error messages.

        Raises:
            UsageError: Another type or shape.
        """
        pixels, classes = np.asarray(images), np.asarray(labels)
        if np.issubdtype(pixels.dtype, np.floating) and pixels.ndim >= 2:
            pixels = pixels.astype(np.float32, copy=False)
        elif pixels.dtype != np.uint8 or pixels.ndim != 4:
            raise UsageError(
                f"{part} images are {pixels.dtype} {list(pixels.shape)}, expected uint8 "
                "[N, C, H, W] for images or float32 [N, F] or [N, C, ...] for other data"
            )
        if not np.issubdtype(classes.dtype, np.integer) or classes.shape != pixels.shape[:1]:
            raise UsageError(
                f"{part} labels are {classes.dtype} {list(classes.shape)}, expected "
                f"integers [{len(pixels)}], one for each image"
            )

        def blocks() -> Iterator[NDArray[Any]]:
            step = max(1, _BLOCK_BYTES // max(1, pixels[:1].nbytes))
            for start in range(0, len(pixels), step):
                yield pixels[start : start + step]

        return cls(classes.astype(np.int64), pixels.shape[1:], pixels.dtype, blocks)


@dataclass(frozen=True)
class Source:
    """A data set to be packed; a user-defined data function returns one."""

    train: Samples
    test: Samples
    classes: tuple[str, ...]
    """Names, by label."""
    mean: NDArray[np.float64] | None = None
    """[C], for normalisation; None: measured on the training pixels, 0 for float data."""
    std: NDArray[np.float64] | None = None
    """[C] likewise; None: measured, 1 for float data."""

    def __post_init__(self) -> None:
        """Check everything that can be checked before an image is read.

        Raises:
            UsageError: No samples, labels outside of the classes, or splits that differ in shape.
        """
        for part, samples in (("train", self.train), ("test", self.test)):
            labels = samples.labels
            if len(labels) == 0:
                raise UsageError(f"the {part} set is empty, expected at least one sample")
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise UsageError(
                    f"{part} labels are from {labels.min()} to {labels.max()}, "
                    f"expected 0 to {len(self.classes) - 1} for {len(self.classes)} classes"
                )
        train, test = self.train, self.test
        if (train.shape, train.dtype) != (test.shape, test.dtype):
            raise UsageError(
                f"training samples are {train.dtype} {list(train.shape)} and test samples "
                f"{test.dtype} {list(test.shape)}, expected the same"
            )
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and np.shape(values) != train.shape[:1]:
                raise UsageError(
                    f"{key} has shape {list(np.shape(values))}, expected one number for each of "
                    f"{train.shape[0]} channels"
                )

    @property
    def nbytes(self) -> int:
        """Bytes of all images, training and test."""
        return self.train.nbytes + self.test.nbytes

    @classmethod
    def from_arrays(
        cls,
        train_images: ArrayLike,
        train_labels: ArrayLike,
        test_images: ArrayLike,
        test_labels: ArrayLike,
        classes: Sequence[str] | None = None,
        mean: ArrayLike | None = None,
        std: ArrayLike | None = None,
    ) -> Source:
        """A source from plain arrays: the shortest way to use a data set of yours.

        Args:
            train_images: uint8 [N, C, H, W], or floating-point [N, F] or [N, C, ...].
            train_labels: Integers [N], from 0.
            test_images: As `train_images`.
            test_labels: As `train_labels`.
            classes: Names by label; `"0"`, `"1"`, … where None.
            mean: See `Source.mean`.
            std: See `Source.std`.

        Raises:
            UsageError: Arrays that do not fit each other; the message names which and how.
        """
        train = Samples.from_arrays(train_images, train_labels, "train")
        test = Samples.from_arrays(test_images, test_labels, "test")
        if classes is None:
            highest = max(int(part.labels.max(initial=-1)) for part in (train, test))
            classes = [str(label) for label in range(highest + 1)]
        given = (None if value is None else np.asarray(value, np.float64) for value in (mean, std))
        return cls(train, test, tuple(classes), *given)


def load(name: str, root: Path | None, arguments: Mapping[str, Any]) -> Source:
    """The source that `[data] name` refers to; reads labels and file names, images only later.

    A user-defined function is called with `root` if its signature takes it, and with `arguments`;
    it returns a `Source`.

    Args:
        name: One of `registry.DATASETS` or `"package.module:function"`.
        root: Folder of the raw data; None for data sets that need none.
        arguments: The table's other entries.

    Raises:
        UsageError: Unknown name, missing root, arguments that do not fit, or data that do not.
    """
    if plugins.is_reference(name):
        function = plugins.resolve(name, "data.name")
    elif name in DATASETS:
        from hpc_absa.data import builtin

        function = getattr(builtin, name)
    else:
        raise UsageError(
            f'data.name: no data set "{name}"{plugins.suggestion(name, DATASETS)} Known are '
            f'{", ".join(DATASETS)} and your own as "package.module:function"'
        )
    if root is not None and not root.exists():
        raise UsageError(f"data.root: {root} does not exist; it should hold the data of {name}")
    offered = {} if root is None else {"root": root}
    source = plugins.call(function, "data", arguments, offered, name)
    if not isinstance(source, Source):
        raise UsageError(
            f"data.name: {name} returned {type(source).__name__}, expected a Source "
            "(hpc_absa.data.sources.Source.from_arrays makes one of arrays)"
        )
    return source
