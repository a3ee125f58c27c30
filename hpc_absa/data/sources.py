"""What a data set consists of before it is packed, and how a job's `[data]` table names one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpc_absa import plugins
from hpc_absa.data.registry import DATASETS
from hpc_absa.errors import UsageError

if TYPE_CHECKING:
    from hpc_absa.data.datasets import Datasets
    from hpc_absa.data.encoded_packing import EncodedSource

_BLOCK_BYTES = 1 << 24  # of an array at a time: large enough for the disk, small in memory
_EXPECTED = (
    "expected uint8 [N, C, H, W] for images or floating-point [N, F] or [N, C, ...] for other "
    "data; return a torch.utils.data.Dataset for inputs of another kind"
)
_EXPECTED_LABELS = (
    "expected integers [N], the class index of each sample, or floating-point [N] or [N, L]; "
    "return a torch.utils.data.Dataset for targets of another kind"
)


@dataclass(frozen=True)
class Samples:
    """N training or test samples; images come in blocks, in the order of the labels.

    `Source` checks and converts them.
    """

    labels: NDArray[Any]
    """Classes [N], from 0 up to their number, integers of any width or booleans; or targets [N] or
    [N, L] of floating point, for regression and several labels."""
    shape: tuple[int, ...]
    """Of one sample: (C, H, W) for images, (F,) or (C, ...) for other data."""
    dtype: np.dtype[Any]
    """uint8 for images, floating-point for other data, which is stored as float32."""
    blocks: Callable[[], Iterator[NDArray[Any]]]
    """Yields arrays [k, *shape], N samples in total."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nbytes(self) -> int:
        return len(self) * prod(self.shape) * self.dtype.itemsize

    @classmethod
    def from_arrays(cls, images: ArrayLike, labels: ArrayLike, part: str = "train") -> Samples:
        """Samples in memory: images uint8 [N, C, H, W] or float [N, F] or [N, C, ...], labels as
        in `Samples`.

        Raises:
            UsageError: Not arrays, or of different lengths; `part` names them.
        """
        pixels, classes = _array(images, f"{part} images"), _array(labels, f"{part} labels")
        if pixels.ndim < 2:
            raise UsageError(f"{part} images are {_type(pixels)}, {_EXPECTED}")
        if classes.shape[:1] != pixels.shape[:1]:
            raise UsageError(
                f"{part} labels are {_type(classes)}, expected one for each of the {len(pixels)} "
                "samples"
            )

        def blocks() -> Iterator[NDArray[Any]]:
            step = max(1, _BLOCK_BYTES // max(1, pixels[:1].nbytes))
            for start in range(0, len(pixels), step):
                yield pixels[start : start + step]

        return cls(classes, pixels.shape[1:], pixels.dtype, blocks)

    def checked(self, part: str) -> Samples:
        """The same with int64 or float32 labels and contiguous blocks of uint8 or float32.

        Blocks are checked as they are read: number, shape, type, and no NaN or infinite values.

        Raises:
            UsageError: What cannot be converted without loss, here or from `blocks`.
        """
        labels = _array(self.labels, f"{part} labels")
        is_class = labels.dtype.kind in "biu" and labels.ndim == 1
        if not is_class and not (labels.dtype.kind == "f" and labels.ndim in (1, 2)):
            raise UsageError(f"{part} labels are {_type(labels)}, {_EXPECTED_LABELS}")
        with np.errstate(over="ignore"):  # becomes infinite, and is refused
            labels = np.ascontiguousarray(labels, np.int64 if is_class else np.float32)
        _require_finite(labels, f"the label of {part} sample")
        shape, given = tuple(int(n) for n in self.shape), np.dtype(self.dtype)
        declared = f"{given} {list(shape)}"
        is_image = given == np.uint8 and len(shape) == 3
        if prod(shape) == 0 or not shape or not (is_image or given.kind == "f"):
            listed = ", ".join(map(str, (len(labels), *shape)))
            raise UsageError(f"{part} images are {given} [{listed}], {_EXPECTED}")
        if is_image and shape[2] in (1, 3, 4) and min(shape[:2]) > 4:
            raise UsageError(
                f"{part} images are {declared} each, which looks like [H, W, C], expected "
                "[C, H, W]; use images.transpose(0, 3, 1, 2)"
            )
        dtype = np.dtype(np.uint8 if is_image else np.float32)

        def blocks() -> Iterator[NDArray[Any]]:
            seen = 0
            for read in self.blocks():
                block = _array(read, f"{part} images")
                same_kind = block.dtype == dtype if is_image else block.dtype.kind == "f"
                if block.shape[1:] != shape or not same_kind:
                    raise UsageError(
                        f"{part} images come as {block.dtype} {list(block.shape[1:])}, but the "
                        f"source declares {declared}"
                    )
                with np.errstate(over="ignore"):  # becomes infinite, and is refused
                    block = np.ascontiguousarray(block, dtype)
                if not is_image:
                    _require_finite(block, f"{part} sample", seen)
                seen += len(block)
                if seen > len(labels):
                    break
                if len(block):
                    yield block
            if seen != len(labels):
                counted = "more" if seen > len(labels) else seen
                raise UsageError(f"the {part} set has {len(labels)} labels but {counted} images")

        return Samples(labels, shape, dtype, blocks)


@dataclass(frozen=True)
class Source:
    """A data set to be packed; a user-defined data function returns one.

    Every way into the program ends here: arrays, blocks, folders and packed files.
    """

    train: Samples
    test: Samples
    classes: Sequence[str]
    """Names of the classes, or of the L labels of targets [N, L]; stored as a tuple of str.
    Integers and numpy's types are converted."""
    mean: NDArray[np.float64] | None = None
    """[C], for normalisation; None: measured on the training pixels, 0 for float data."""
    std: NDArray[np.float64] | None = None
    """[C] likewise; None: measured, 1 for float data. Constant channels are divided by 1."""
    notes: Counter[str] = field(default_factory=Counter)
    """What was left out or converted, and how often; complete once all blocks were read."""

    def __post_init__(self) -> None:
        """Check and convert everything that can be before an image is read.

        Raises:
            UsageError: No samples, labels outside of the classes, splits that differ in shape, or
                values of a wrong type.
        """
        train, test = self.train.checked("train"), self.test.checked("test")
        classes = _class_names(self.classes)
        kinds = [(samples.labels.dtype, samples.labels.shape[1:]) for samples in (train, test)]
        if kinds[0] != kinds[1]:
            raise UsageError(
                f"training labels are {_type(train.labels)} and test labels "
                f"{_type(test.labels)}, expected the same kind"
            )
        is_class = train.labels.dtype == np.int64
        for part, samples in (("train", train), ("test", test)):
            labels = samples.labels
            if len(labels) == 0:
                raise UsageError(f"the {part} set is empty, expected at least one sample")
            if labels.ndim == 2 and labels.shape[1] != len(classes):
                raise UsageError(
                    f"{part} labels are {_type(labels)}, and there are {len(classes)} classes: "
                    "expected as many columns"
                )
            if is_class and (labels.min() < 0 or labels.max() >= len(classes)):
                raise UsageError(
                    f"{part} labels are from {labels.min()} to {labels.max()}, "
                    f"expected 0 to {len(classes) - 1} for {len(classes)} classes"
                )
        if (train.shape, train.dtype) != (test.shape, test.dtype):
            raise UsageError(
                f"training samples are {train.dtype} {list(train.shape)} and test samples "
                f"{test.dtype} {list(test.shape)}, expected the same"
            )
        if is_class:
            present = np.count_nonzero(np.bincount(train.labels, minlength=len(classes)))
            if absent := len(classes) - int(present):
                self.notes["classes without training samples"] = absent
        mean, std = (
            None if value is None else _channels(key, value, train.shape[0])
            for key, value in (("mean", self.mean), ("std", self.std))
        )
        if mean is not None and train.dtype == np.uint8 and (mean.min() < 0 or mean.max() > 1):
            raise UsageError(
                f"mean is {mean.tolist()}, expected 0 (black) to 1 (white) for images; divide "
                "mean and std by 255"
            )
        if std is not None:
            if std.min() < 0:
                raise UsageError(f"std is {std.tolist()}, expected no negative numbers")
            # What float32 cannot tell from a constant would be noise, or NaN, after the division.
            center = np.zeros_like(std) if mean is None else np.abs(mean)
            constant = std <= 10 * np.finfo(np.float32).eps * center
            if constant.any():
                self.notes["constant channels, divided by 1"] = int(constant.sum())
            std = np.where(constant, 1.0, std)
        # The class is frozen; this is how its own fields are set.
        vars(self).update(train=train, test=test, classes=classes, mean=mean, std=std)

    @property
    def nbytes(self) -> int:
        return self.train.nbytes + self.test.nbytes

    @classmethod
    def from_arrays(
        cls,
        train_images: ArrayLike,
        train_labels: ArrayLike,
        test_images: ArrayLike,
        test_labels: ArrayLike,
        classes: Sequence[Any] | None = None,
        mean: ArrayLike | None = None,
        std: ArrayLike | None = None,
    ) -> Source:
        """A source from plain arrays: the shortest way to use a data set of yours.

        Args:
            train_images: uint8 [N, C, H, W], or floating-point [N, F] or [N, C, ...].
            train_labels: Integers [N], from 0; or floating-point [N] or [N, L].
            test_images: As `train_images`.
            test_labels: As `train_labels`.
            classes: Names by label; `"0"`, `"1"`, … if None, and none for targets [N].
            mean: See `Source.mean`.
            std: See `Source.std`.

        Raises:
            UsageError: Arrays that do not fit each other; the message names which and how.
        """
        train = Samples.from_arrays(train_images, train_labels, "train")
        test = Samples.from_arrays(test_images, test_labels, "test")
        if classes is None:
            both = (train.checked("train").labels, test.checked("test").labels)
            if both[0].dtype == np.int64:
                classes = range(1 + max(int(labels.max(initial=-1)) for labels in both))
            else:
                classes = range(both[0].shape[1] if both[0].ndim == 2 else 0)
        return cls(train, test, classes, mean, std)  # type: ignore[arg-type]  # converted there


def decoded(name: str | bytes | Path) -> str:
    """Text that can be stored and printed: from UTF-8, or else Latin-1, as in older file names."""
    data = name.encode("utf-8", "surrogateescape") if isinstance(name, str) else os.fsencode(name)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def _array(value: Any, title: str) -> NDArray[Any]:
    if np.ma.is_masked(value):
        raise UsageError(f"{title} are a masked array with masked values; fill or remove them")
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        # Lists of different lengths, or a tensor on a GPU or with gradients.
        raise UsageError(f"{title} cannot be converted to a numpy array ({error})") from error


def _require_finite(values: NDArray[Any], title: str, first: int = 0) -> None:
    """Refuse NaN and infinite values; `title` and a number from `first` on name the sample."""
    if not (finite := np.isfinite(values)).all():
        sample = first + int(finite.reshape(len(values), -1).all(1).argmin())
        raise UsageError(
            f"{title} {sample} has NaN or infinite values (as float32); remove the sample or "
            "replace them"
        )


def _type(array: NDArray[Any]) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _class_names(classes: Any) -> tuple[str, ...]:
    if isinstance(classes, (str, bytes, Set, Mapping)) or not isinstance(classes, Iterable):
        raise UsageError(
            f"classes is a {type(classes).__name__}, expected a list of names by label"
        )
    classes = list(classes)
    for label, name in enumerate(classes):
        if not isinstance(name, (str, bytes, int, np.integer)):
            raise UsageError(f"classes[{label}] is a {type(name).__name__}, expected a string")
    return tuple(decoded(n) if isinstance(n, (str, bytes)) else str(int(n)) for n in classes)


def _channels(key: str, values: Any, channels: int) -> NDArray[np.float64]:
    array = _array(values, key)
    if array.shape != (channels,):
        raise UsageError(
            f"{key} has shape {list(array.shape)}, expected one number for each of "
            f"{channels} channels"
        )
    if array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise UsageError(f"{key} is {array.tolist()}, expected finite numbers")
    return array.astype(np.float64)


def load(
    name: str, root: Path | None, arguments: Mapping[str, Any]
) -> Source | EncodedSource | Datasets:
    """What `[data] name` refers to; of a `Source` labels and file names are read, images later.

    Args:
        name: One of `registry.DATASETS`, or `"package.module:function"`, which returns a `Source`,
            a map-style data set, a pair of them for training and test, or `Datasets`.
        root: Folder of the raw data, passed if the function takes it; None if there is none.
        arguments: The table's other entries.

    Raises:
        UsageError: Unknown name, missing root, arguments or data that do not fit.
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
    from hpc_absa.data.encoded_packing import EncodedSource

    if isinstance(source, Source | EncodedSource):
        return source
    from hpc_absa.data.datasets import as_datasets  # imports torch

    try:
        datasets = as_datasets(source)
    except UsageError as error:
        raise UsageError(f"data.name: {name}: {error}") from error
    if datasets is None:
        raise UsageError(
            f"data.name: {name} returned {type(source).__name__}, expected a Source "
            "(hpc_absa.data.sources.Source.from_arrays makes one of arrays), or one or two "
            "torch.utils.data.Dataset"
        )
    return datasets
