"""The built-in data sets; `builtin` has a function of the same name that reads each of them."""

from __future__ import annotations

DATASETS: dict[str, int | None] = {
    "digits": 1437,
    "imagefolder": None,
    "cifar10": 50_000,
    "cifar100": 50_000,
    "svhn": 73_257,
    "tinyimagenet": 100_000,
    "imagenet": 1_281_167,
}
"""Training samples by name; None if the number depends on the user's files."""


def known_size(name: str) -> int | None:
    """Training samples of `[data] name`; None if only its files have the number."""
    return DATASETS.get(name)


def augmented_by_default(name: str) -> bool:
    """Whether images of `[data] name` are cropped and flipped unless the job decides.

    Digits and user-defined data are not: a flip may change what an image means.
    """
    return name in DATASETS and name != "digits"
