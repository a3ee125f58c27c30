"""Data sets by name, and the user's own as `"package.module:function"`; all from a local root."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hpc_absa import plugins
from hpc_absa.data.content import Samples, Source
from hpc_absa.data.order import permutation
from hpc_absa.errors import UsageError

__all__ = ["SOURCES", "Samples", "Source", "load"]


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


def imagefolder(root: Path, image_size: int | None = None) -> Source:
    """`train/<class>/*` and `test/<class>/*` (or `val/`), any picture format that Pillow reads.

    Args:
        root: The folder with `train`.
        image_size: Pixels: pictures are cropped to a square around the centre and resized to it;
            None where all have one size already.
    """
    from hpc_absa.data import folders

    return folders.image_folder(root, image_size)


def cifar10(root: Path) -> Source:
    """CIFAR-10: the original `cifar-10-batches-py`, or pictures as for `imagefolder`."""
    from hpc_absa.data import published

    return published.cifar(root, "CIFAR10")


def cifar100(root: Path) -> Source:
    """CIFAR-100: the original `cifar-100-python`, or pictures as for `imagefolder`."""
    from hpc_absa.data import published

    return published.cifar(root, "CIFAR100")


def svhn(root: Path) -> Source:
    """SVHN, cropped digits: `train_32x32.mat` and `test_32x32.mat`."""
    from hpc_absa.data import published

    return published.svhn(root)


def tinyimagenet(root: Path, image_size: int = 64) -> Source:
    """Tiny ImageNet as published (`train/<wnid>/images`, `val/val_annotations.txt`) or as folders.

    Args:
        root: The folder `tiny-imagenet-200`, or the one that holds it.
        image_size: Pixels, 64 as published.
    """
    from hpc_absa.data import published

    return published.tiny_imagenet(root, image_size)


def imagenet(root: Path, image_size: int = 224) -> Source:
    """ImageNet (ILSVRC 2012) as folders: `train/<wnid>/*.JPEG` and `val/<wnid>/*.JPEG`.

    Args:
        root: The folder with `train` and `val`.
        image_size: Pixels, after a centred crop and resize.
    """
    from hpc_absa.data import folders

    return folders.image_folder(root, image_size)


SOURCES: Mapping[str, Callable[..., Source]] = {
    function.__name__: function
    for function in (digits, imagefolder, cifar10, cifar100, svhn, tinyimagenet, imagenet)
}


def load(name: str, root: Path | None, arguments: Mapping[str, Any]) -> Source:
    """The source that `[data] name` means; reads labels and file names, images only later.

    A user's own function is called with `root` where its signature takes it, and with the table's
    other arguments; it returns a `Source`.

    Args:
        name: One of `SOURCES` or `"package.module:function"`.
        root: Where the raw data lies; None for those that need none.
        arguments: The table's other entries.

    Raises:
        UsageError: Unknown name, missing root, arguments that do not fit, or data that do not.
    """
    if plugins.is_reference(name):
        function = plugins.resolve(name, "data.name")
    elif name in SOURCES:
        function = SOURCES[name]
    else:
        raise UsageError(
            f'data.name: no data set "{name}"{plugins.suggestion(name, SOURCES)} Known are '
            f'{", ".join(SOURCES)} and your own as "package.module:function"'
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
