"""What a data set consists of before it is packed: labels now, images as they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpc_absa.errors import UsageError

_BLOCK_BYTES = 1 << 24  # of an array at a time: large enough for the disk, small in memory


@dataclass(frozen=True)
class Samples:
    """The training or the test samples, N of them; images come in blocks, in the labels' order."""

    labels: NDArray[np.int64]
    """[N], from 0 up to the number of classes."""
    shape: tuple[int, ...]
    """Of one sample: (C, H, W) for pictures, (F,) or (C, ...) for other data."""
    dtype: np.dtype[Any]
    """uint8 for pictures, float32 for other data."""
    blocks: Callable[[], Iterator[NDArray[Any]]]
    """Yields arrays [k, *shape], k ≥ 1, altogether N samples."""

    def __len__(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        """Bytes of all images."""
        return len(self) * prod(self.shape) * self.dtype.itemsize

    @classmethod
    def from_arrays(cls, images: ArrayLike, labels: ArrayLike, part: str = "train") -> Samples:
        """Samples that are in memory already.

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
                "[N, C, H, W] for pictures or float32 [N, F] or [N, C, ...] for other data"
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
    """A data set to be packed; what a user's own data function returns."""

    train: Samples
    test: Samples
    classes: tuple[str, ...]
    """Their names, by label."""
    mean: NDArray[np.float64] | None = None
    """[C], for normalisation; None: measured on the training pixels, 0 for float data."""
    std: NDArray[np.float64] | None = None
    """[C] likewise; None: measured, 1 for float data."""

    def __post_init__(self) -> None:
        """Everything that can be checked before an image is read.

        Raises:
            UsageError: No samples, labels outside of the classes, or splits that differ in shape.
        """
        for part, samples in (("train", self.train), ("test", self.test)):
            labels = samples.labels
            if len(labels) == 0:
                raise UsageError(f"the {part} set is empty, expected at least one sample")
            if labels.min() < 0 or labels.max() >= len(self.classes):
                raise UsageError(
                    f"{part} labels go from {labels.min()} to {labels.max()}, "
                    f"expected 0 to {len(self.classes) - 1} for {len(self.classes)} classes"
                )
        kinds = [(samples.shape, samples.dtype) for samples in (self.train, self.test)]
        if kinds[0] != kinds[1]:
            raise UsageError(
                f"training samples are {kinds[0][1]} {list(kinds[0][0])} and test samples "
                f"{kinds[1][1]} {list(kinds[1][0])}, expected the same"
            )
        for key, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and np.shape(values) != self.train.shape[:1]:
                raise UsageError(
                    f"{key} has shape {list(np.shape(values))}, expected one number for each of "
                    f"{self.train.shape[0]} channels"
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
        """A source from plain arrays: the shortest way to bring one's own data.

        Args:
            train_images: uint8 [N, C, H, W], or floating-point [N, F] or [N, C, ...].
            train_labels: Integers [N], from 0.
            test_images: As `train_images`.
            test_labels: As `train_labels`.
            classes: Names by label; `"0"`, `"1"`, … where None.
            mean: See `Source.mean`.
            std: See `Source.std`.

        Raises:
            UsageError: Arrays that do not fit each other; the message says which and how.
        """
        train = Samples.from_arrays(train_images, train_labels, "train")
        test = Samples.from_arrays(test_images, test_labels, "test")
        if classes is None:
            highest = max(int(part.labels.max(initial=-1)) for part in (train, test))
            classes = [str(label) for label in range(highest + 1)]
        return cls(train, test, tuple(classes), _vector(mean), _vector(std))


def _vector(values: ArrayLike | None) -> NDArray[np.float64] | None:
    return None if values is None else np.asarray(values, np.float64)
