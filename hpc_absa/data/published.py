"""Well-known data sets in the layouts they are published in, through torchvision's classes."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hpc_absa.data import folders
from hpc_absa.data.content import Source
from hpc_absa.errors import HpcAbsaError, UsageError


def cifar(root: Path, kind: Literal["CIFAR10", "CIFAR100"]) -> Source:
    """CIFAR from the original binary release under `root`, or from folders of pictures.

    Raises:
        UsageError: Neither is there.
        HpcAbsaError: The release is there, but its files are not those published.
    """
    dataset = getattr(_datasets(), kind)
    # The folder itself may have been given as well as the one that holds it.
    base = root.parent if root.name == dataset.base_folder else root
    if not (base / dataset.base_folder).is_dir():
        if folders.is_image_folder(root):
            return folders.image_folder(root, None)
        raise UsageError(
            f"data.root: neither {base / dataset.base_folder} (the original files) nor "
            f"{root}/train/<class>/*.jpg"
        )
    train, test = (_published(dataset, base, train=train) for train in (True, False))
    return Source.from_arrays(
        _channels_first(train.data),
        np.array(train.targets),
        _channels_first(test.data),
        np.array(test.targets),
        classes=train.classes,
    )


def svhn(root: Path) -> Source:
    """SVHN, cropped digits, from `train_32x32.mat` and `test_32x32.mat` in `root`.

    Raises:
        UsageError: They are not there.
        HpcAbsaError: They are not those published.
    """
    dataset = _datasets().SVHN
    for name in ("train_32x32.mat", "test_32x32.mat"):
        if not (root / name).is_file():
            raise UsageError(f"data.root: no file {root / name}; SVHN (cropped digits) has it")
    train, test = (_published(dataset, root, split=split) for split in ("train", "test"))
    return Source.from_arrays(train.data, train.labels, test.data, test.labels)


def tiny_imagenet(root: Path, image_size: int) -> Source:
    """Tiny ImageNet: its test set is `val`, as the labels of `test` were never published.

    Raises:
        UsageError: Neither the published layout nor folders of pictures are there.
    """
    nested = root / "tiny-imagenet-200"
    root = nested if nested.is_dir() else root
    annotations = root / "val" / "val_annotations.txt"
    if not annotations.is_file():
        return folders.image_folder(root, image_size)
    wnids, train_files, train_labels = folders.listing(root / "train")
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    files, labels = [], []
    for line in annotations.read_text().splitlines():
        name, wnid, *_ = line.split("\t")
        if wnid not in label_of:
            raise UsageError(f"data.root: {annotations} names class {wnid}, which train/ has not")
        files.append(root / "val" / "images" / name)
        labels.append(label_of[wnid])
    return folders.from_files((train_files, train_labels), (files, labels), wnids, image_size)


def _datasets() -> Any:
    from hpc_absa.torchvision_import import torchvision

    torchvision()
    return importlib.import_module("torchvision.datasets")


def _published(dataset: Any, root: Path, **which: Any) -> Any:
    """One part of a data set, after torchvision compared its files with their checksums.

    The comparison is also what makes it safe to unpickle CIFAR's files.
    """
    try:
        return dataset(str(root), download=False, **which)
    except RuntimeError as error:
        raise HpcAbsaError(
            f"data.root: files of {dataset.__name__} in {root} are missing or damaged (checksums "
            "differ from the published ones); copy them anew"
        ) from error


def _channels_first(images: Any) -> Any:
    """uint8 [N, H, W, C] as [N, C, H, W], without copying."""
    return np.asarray(images).transpose(0, 3, 1, 2)
