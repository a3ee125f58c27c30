"""Pictures in folders, one a class: listed by torchvision, decoded by Pillow in several threads."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_absa.data.content import Samples, Source
from hpc_absa.errors import HpcAbsaError, UsageError

_TEST_FOLDERS = ("test", "val", "valid", "validation")
_BLOCK_PIXELS = 1 << 22  # decoded at a time: 4096 pictures of 32 × 32, 83 of 224 × 224


def image_folder(root: Path, image_size: int | None) -> Source:
    """A source of `train/<class>/*` and `test/<class>/*` (or `val/`) under `root`.

    Args:
        root: The folder with `train`.
        image_size: See `sources.imagefolder`.

    Raises:
        UsageError: Missing or empty folders, or classes that differ between train and test.
    """
    train = root / "train"
    test = next((root / name for name in _TEST_FOLDERS if (root / name).is_dir()), root / "test")
    for folder in (train, test):
        if not folder.is_dir():
            raise UsageError(
                f"data.root: no folder {folder}; expected {root}/train/<class>/*.jpg "
                f"and {root}/test/<class>/*.jpg (or val/)"
            )
    classes, train_files, train_labels = listing(train)
    test_classes, test_files, test_labels = listing(test)
    if classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))
        raise UsageError(
            f"data.root: {train} and {test} have different classes ({_some(odd)} in one of them "
            "only)"
        )
    return from_files((train_files, train_labels), (test_files, test_labels), classes, image_size)


def is_image_folder(root: Path) -> bool:
    """Whether `root` looks like one."""
    return (root / "train").is_dir()


def listing(folder: Path) -> tuple[list[str], list[Path], list[int]]:
    """Class names, files, and the files' labels, as torchvision's `ImageFolder` sorts them.

    Raises:
        UsageError: No class folders, or one without pictures.
    """
    from hpc_absa.torchvision_import import torchvision

    torchvision()
    datasets = importlib.import_module("torchvision.datasets")
    try:
        found = datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:
        empty = [entry.name for entry in sorted(folder.iterdir()) if _is_empty_class(entry)]
        what = f"no pictures of class {_some(empty)}" if empty else "no class folders"
        raise UsageError(f"data.root: {what} in {folder}; expected <class>/*.jpg there") from error
    paths, labels = zip(*found.samples, strict=True)
    return list(found.classes), [Path(path) for path in paths], list(labels)


def from_files(
    train: tuple[Sequence[Path], Sequence[int]],
    test: tuple[Sequence[Path], Sequence[int]],
    classes: Sequence[str],
    image_size: int | None,
) -> Source:
    """A source of picture files and their labels; pictures are decoded while they are packed."""
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise UsageError(f"data.image_size: {image_size}, expected pixels, a whole number from 1")
    shape = decode(train[0][0], image_size).shape
    return Source(
        _samples(*train, shape, image_size), _samples(*test, shape, image_size), tuple(classes)
    )


def decode(file: Path, image_size: int | None) -> NDArray[np.uint8]:
    """One picture as uint8 [3, H, W], RGB.

    Args:
        file: In any format that Pillow reads.
        image_size: Crop to the largest centred square and resize (bilinear over the whole area)
            to so many pixels; None leaves it as it is.

    Raises:
        HpcAbsaError: Not a picture, or truncated; names the file.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as image:
            if image_size is not None:
                # A JPEG can be decoded at a half, a quarter, ... of its size, in less time.
                image.draft("RGB", (image_size, image_size))
            picture = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise HpcAbsaError(f"{file}: unreadable picture ({error}); replace or remove it") from error
    if image_size is not None and picture.size != (image_size, image_size):
        picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.BILINEAR)
    return np.asarray(picture).transpose(2, 0, 1)


def _samples(
    files: Sequence[Path], labels: Sequence[int], shape: tuple[int, ...], image_size: int | None
) -> Samples:
    count = max(1, _BLOCK_PIXELS // (shape[1] * shape[2]))

    def blocks() -> Iterator[NDArray[Any]]:
        # Pillow lets other threads run while it decodes. Processes would gain more for very small
        # pictures, but cannot be forked off safely where MPI or torch's threads already run.
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for start in range(0, len(files), count):
                group = files[start : start + count]
                pictures = pool.map(lambda file: _fitting(file, image_size, shape), group)
                yield _stacked(pictures, len(group), shape)

    return Samples(np.array(labels, np.int64), shape, np.dtype(np.uint8), blocks)


def _stacked(
    pictures: Iterable[NDArray[np.uint8]], count: int, shape: tuple[int, ...]
) -> NDArray[np.uint8]:
    block = np.empty((count, *shape), np.uint8)
    for index, picture in enumerate(pictures):
        block[index] = picture
    return block


def _fitting(file: Path, image_size: int | None, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    picture = decode(file, image_size)
    if picture.shape != shape:
        raise UsageError(
            f"{file}: {picture.shape[2]} × {picture.shape[1]} pixels, others {shape[2]} × "
            f"{shape[1]}; set data.image_size to crop and resize all of them"
        )
    return picture


def _is_empty_class(folder: Path) -> bool:
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folder.is_dir():
        return False
    return not any(
        name.lower().endswith(IMG_EXTENSIONS) for *_, names in os.walk(folder) for name in names
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
