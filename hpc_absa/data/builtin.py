"""The built-in data sets (`registry.DATASETS`), one function each, all read from a local folder.

Published releases are read by torchvision's classes, which compare checksums. Images in folders
are listed and decoded as by torchvision's `ImageFolder`, in several threads; what becomes of each
kind of file and image is in docs/data.md.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from hpc_absa.data.encoded import cores, reduction_of
from hpc_absa.data.encoded import decode as decode_rgb
from hpc_absa.data.encoded_packing import EncodedSource
from hpc_absa.data.order import permutation
from hpc_absa.data.sources import Samples, Source, decoded
from hpc_absa.errors import HpcAbsaError, UsageError
from hpc_absa.torchvision_import import torchvision

_TEST_FOLDERS = ("test", "val", "valid", "validation")
_BLOCK_PIXELS = 1 << 22  # decoded at a time: 4096 images of 32 × 32, 83 of 224 × 224

_NOT_IMAGES = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}
"""Formats that Pillow only identifies, or decodes with the help of other programs."""

Labelled = tuple[Sequence[Path], Sequence[int]]
"""Image files and the label of each."""


def digits() -> Source:
    """Scikit-learn's 1797 handwritten digits, 8 × 8 pixels, grey; part of its installation.

    Its values 0 … 16 become 0 … 255. The fixed test set is every fifth image of each class in a
    shuffled order: 1437 for training, 360 for testing, the classes in equal parts.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[:, None]
    labels = bunch.target.astype(np.int64)
    shuffled = permutation(0, 0, len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    test = np.sort(by_class[::5])
    train = np.setdiff1d(by_class, test)
    return Source.from_arrays(images[train], labels[train], images[test], labels[test])


def cifar10(root: Path) -> Source:
    """The original `cifar-10-batches-py` in `root` or `root` itself, or as `imagefolder`."""
    return _cifar(root, "CIFAR10")


def cifar100(root: Path) -> Source:
    """The original `cifar-100-python` in `root` or `root` itself, or as `imagefolder`."""
    return _cifar(root, "CIFAR100")


def svhn(root: Path) -> Source:
    """SVHN, cropped digits, from `train_32x32.mat` and `test_32x32.mat` in `root`."""
    for name in ("train_32x32.mat", "test_32x32.mat"):
        if not (root / name).is_file():
            raise UsageError(f"data.root: no file {root / name}; SVHN (cropped digits) has it")
    dataset = torchvision().datasets.SVHN
    train, test = (_published(dataset, root, split=split) for split in ("train", "test"))
    return Source.from_arrays(train.data, train.labels, test.data, test.labels)


def tinyimagenet(root: Path, image_size: int = 64) -> Source:
    """Tiny ImageNet as published in `tiny-imagenet-200`, or as `imagefolder`.

    Its `val` (`val/val_annotations.txt`) is the test set, as the labels of `test` were never
    published.
    """
    nested = root / "tiny-imagenet-200"
    root = nested if nested.is_dir() else root
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return _decoded_folders(root, image_size)
    notes: Counter[str] = Counter()
    classes, train = _listing(root / "train", notes)
    label_of = {wnid: label for label, wnid in enumerate(classes)}
    files, labels = [], []
    for line in annotations.read_text("utf-8").splitlines():
        name, wnid, *_ = line.split("\t")
        if wnid not in label_of:
            raise UsageError(f"data.root: {annotations} has class {wnid}, train/ has no such class")
        files.append(root / "val" / "images" / name)
        labels.append(label_of[wnid])
    return _from_files(train, (files, labels), classes, image_size, notes)


def imagenet(
    root: Path, image_size: int = 224, encoded: bool = False, unreadable: str = "stop"
) -> Source | EncodedSource:
    """ImageNet (ILSVRC 2012) as folders: `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`."""
    return imagefolder(root, image_size, encoded, unreadable)


def imagefolder(
    root: Path,
    image_size: int | None = None,
    encoded: bool = False,
    unreadable: str = "stop",
) -> Source | EncodedSource:
    """`train/<class>/**` and `test/<class>/**` (or `val/`), any image format that Pillow reads.

    Args:
        root: The folder with `train`.
        image_size: Images are cropped to a square around the centre and resized to so many pixels;
            None where all have the same size already.
        encoded: The files are packed as they are, and decoded in training.
        unreadable: With `encoded`, `"stop"` or `"skip"`: what an unreadable file does.

    Raises:
        UsageError: Missing or empty folders, or classes that differ between train and test.
    """
    if unreadable not in ("stop", "skip"):
        raise UsageError(f"data.unreadable = {unreadable!r}: expected 'stop' or 'skip'")
    if not encoded:
        if unreadable != "stop":
            raise UsageError(f"data.unreadable = {unreadable!r}: expected encoded = true with it")
        return _decoded_folders(root, image_size)
    if image_size is None:
        raise UsageError("data.image_size: missing, expected the side of the crops in pixels")
    _check_size(image_size)
    train, test, classes, notes = _folders(root)
    return EncodedSource(train, test, classes, image_size, unreadable == "skip", notes)


def _decoded_folders(root: Path, image_size: int | None = None) -> Source:
    train, test, classes, notes = _folders(root)
    return _from_files(train, test, classes, image_size, notes)


def _folders(root: Path) -> tuple[Labelled, Labelled, list[str], Counter[str]]:
    """Training files, test files, classes, and what was left out."""
    train = root / "train"
    present = [root / name for name in _TEST_FOLDERS if (root / name).is_dir()]
    # a `test` without class folders has no labels, as ImageNet's
    test = next(filter(_has_folders, present), present[0] if present else root / "test")
    for folder in (train, test):
        if not folder.is_dir():
            raise UsageError(
                f"data.root: no folder {folder}; expected {root}/train/<class>/*.jpg "
                f"and {root}/test/<class>/*.jpg (or val/)"
            )
    notes: Counter[str] = Counter()
    classes, train_files = _listing(train, notes)
    test_classes, test_files = _listing(test, notes)
    if classes != test_classes:
        odd = _some(sorted(set(classes) ^ set(test_classes)))
        raise UsageError(
            f"data.root: {train} and {test} have different classes ({odd} in one of them only)"
        )
    return train_files, test_files, classes, notes


def _has_folders(path: Path) -> bool:
    try:
        with os.scandir(path) as entries:
            return any(e.is_dir() and not e.name.startswith(".") for e in entries)
    except OSError as error:
        _unreadable(error)


def _cifar(root: Path, kind: str) -> Source:
    dataset = getattr(torchvision().datasets, kind)
    base = root.parent if root.name == dataset.base_folder else root
    if not (base / dataset.base_folder).is_dir():
        if (root / "train").is_dir():
            return _decoded_folders(root)
        raise UsageError(
            f"data.root: neither {base / dataset.base_folder} (the original files) nor "
            f"{root}/train/<class>/*.jpg"
        )
    train, test = (_published(dataset, base, train=train) for train in (True, False))
    # uint8 [N, H, W, C] to [N, C, H, W], without a copy.
    images, test_images = (part.data.transpose(0, 3, 1, 2) for part in (train, test))
    return Source.from_arrays(images, train.targets, test_images, test.targets, train.classes)


def _published(dataset: Any, root: Path, **which: Any) -> Any:
    """One part of a data set, after torchvision compared its files with their checksums.

    The comparison is also what makes it safe to unpickle CIFAR's files.
    """
    try:
        return dataset(str(root), download=False, **which)
    except RuntimeError as error:
        raise HpcAbsaError(
            f"data.root: files of {dataset.__name__} in {root} are missing or damaged (checksums "
            "differ from the published ones); copy them again"
        ) from error


def _listing(folder: Path, notes: Counter[str]) -> tuple[list[str], Labelled]:
    """Class names and labelled files, in the order of torchvision's `ImageFolder`."""
    classes: list[str] = []
    empty: list[str] = []
    files: list[Path] = []
    labels: list[int] = []
    try:
        entries = sorted(folder.iterdir(), key=os.fsencode)
    except OSError as error:
        _unreadable(error)
    for entry in entries:
        if entry.name.startswith("."):
            notes["hidden files and folders, left out"] += 1
        elif not entry.is_dir():
            notes["files outside of the class folders, left out"] += 1
        else:
            images, name = _images(entry, notes), decoded(entry.name)
            if not images:
                empty.append(name)
            files += images
            labels += [len(classes)] * len(images)
            classes.append(name)
    if empty or not classes:
        what = f"no images of class {_some(empty)}" if empty else "no class folders"
        raise UsageError(f"data.root: {what} in {folder}; expected <class>/*.jpg there")
    return classes, (files, labels)


def _images(folder: Path, notes: Counter[str]) -> list[Path]:
    """The image files in a folder and those below it, sorted by folder and then by name."""
    images = []
    for parent, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        hidden = [name for name in folders + names if name.startswith(".")]
        notes.update(["hidden files and folders, left out"] * len(hidden))
        folders[:] = [name for name in folders if name not in hidden]
        for name in (name for name in names if not name.startswith(".")):
            suffix = os.path.splitext(name)[1].lower()
            if suffix in _suffixes():
                images.append(Path(parent, name))
            else:
                kind = decoded(Path(suffix)) if suffix else "none"
                notes[f"files left out, suffix {kind}"] += 1
    return sorted(images, key=lambda path: (os.fsencode(path.parent), os.fsencode(path.name)))


def _unreadable(error: OSError) -> NoReturn:
    raise UsageError(f"data.root: {error.filename}: {error.strerror}") from error


@cache
def _suffixes() -> frozenset[str]:
    from PIL import Image

    known = Image.registered_extensions()  # loads all formats
    return frozenset(s for s, kind in known.items() if kind in Image.OPEN.keys() - _NOT_IMAGES)


def _from_files(
    train: Labelled,
    test: Labelled,
    classes: Sequence[str],
    image_size: int | None,
    notes: Counter[str],
) -> Source:
    """A source whose images are decoded while they are packed."""
    _check_size(image_size)
    shape = decode(train[0][0], image_size).shape
    samples = [_samples(*part, shape, image_size, notes) for part in (train, test)]
    return Source(samples[0], samples[1], classes, notes=notes)


def _check_size(image_size: int | None) -> None:
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise UsageError(f"data.image_size: {image_size}, expected pixels, a whole number from 1")


def _samples(
    files: Sequence[Path],
    labels: Sequence[int],
    shape: tuple[int, ...],
    image_size: int | None,
    notes: Counter[str],
) -> Samples:
    count = max(1, _BLOCK_PIXELS // (shape[1] * shape[2]))

    def blocks() -> Iterator[NDArray[Any]]:
        # Pillow lets other threads run while it decodes. Processes would gain more for very small
        # images, but cannot be forked safely where threads of MPI or torch are running.
        with ThreadPoolExecutor(cores()) as pool:
            for start in range(0, len(files), count):
                group = files[start : start + count]
                remarks: list[str] = []
                images = pool.map(lambda file: decode(file, image_size, remarks), group)  # noqa: B023
                block = np.empty((len(group), *shape), np.uint8)
                for index, image in enumerate(images):
                    if image.shape != shape:
                        raise UsageError(
                            f"{decoded(group[index])}: {image.shape[2]} × {image.shape[1]} pixels, "
                            f"others {shape[2]} × {shape[1]}; set data.image_size to crop and "
                            "resize all of them"
                        )
                    block[index] = image
                notes.update(remarks)
                yield block

    return Samples(np.array(labels, np.int64), shape, np.dtype(np.uint8), blocks)


def decode(
    file: Path, image_size: int | None, remarks: list[str] | None = None
) -> NDArray[np.uint8]:
    """One image as uint8 [3, H, W], RGB: what Pillow's `convert("RGB")` gives.

    Args:
        file: In any format that Pillow reads.
        image_size: Crop to the largest centred square and resize (bilinear over the whole area)
            to so many pixels; None keeps the size.
        remarks: Is extended by what the conversion left out.

    Raises:
        UsageError: More than 8 bits per pixel in a mode that Pillow would clip.
        HpcAbsaError: Not an image, or truncated; names the file.
    """
    from PIL import Image, ImageOps

    size = image_size and (image_size, image_size)
    # A JPEG can be decoded at a half, a quarter, ... of its size, in less time.
    reduction = partial(reduction_of, size=size) if size else 1
    try:
        image = decode_rgb(file, decoded(file), reduction, remarks)
    except UsageError:
        raise
    except HpcAbsaError as error:
        raise HpcAbsaError(f"{error}; replace or remove it") from error
    if size and image.size != size:
        image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    return np.asarray(image).transpose(2, 0, 1)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
