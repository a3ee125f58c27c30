"""The built-in data sets; `builtin` has a function of the same name that reads each of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set without its files."""

    samples: int | None
    """Training samples; None where that depends on the user's files."""
    augmented: bool = True
    """Whether images are padded, cropped and flipped unless the job decides."""


DATASETS = {
    "digits": Dataset(1437, augmented=False),  # a mirrored digit is another or none
    "imagefolder": Dataset(None),
    "cifar10": Dataset(50_000),
    "cifar100": Dataset(50_000),
    "svhn": Dataset(73_257),
    "tinyimagenet": Dataset(100_000),
    "imagenet": Dataset(1_281_167),
}


def known_size(name: str) -> int | None:
    """Training samples of `[data] name`, None where only its files can answer."""
    return DATASETS[name].samples if name in DATASETS else None


def augmented_by_default(name: str) -> bool:
    """Whether images of `[data] name` are cropped and flipped where the job does not say.

    User-defined data are not: a flip may change what an image means.
    """
    return name in DATASETS and DATASETS[name].augmented
