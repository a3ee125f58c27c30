"""Part of a data set."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from hpc_absa.data.order import permutation
from hpc_absa.data.packed import PackedDataset, Split
from hpc_absa.errors import UsageError

SEED = 0
"""Of the choice: the same samples for every seed of a job."""

Part = Literal["train", "test"]


def subset(dataset: PackedDataset, part: Part, count: int) -> PackedDataset:
    """`dataset` with `count` training or test samples, chosen at random but always the same.

    Pixels are copied into memory. The rest of the data set stays as it is.

    Raises:
        UsageError: there are fewer.
    """
    whole = dataset.train if part == "train" else dataset.test
    if count > len(whole):
        name = {"train": "training", "test": "test"}[part]
        raise UsageError(
            f"data.{part}_samples = {count}: expected at most the {len(whole)} {name} samples of "
            f"{dataset.name}"
        )
    chosen = np.sort(permutation(SEED, 0, len(whole))[:count])
    images = whole.images.part(chosen) if dataset.is_encoded else whole.images[chosen]
    chosen_split = Split(images, whole.labels[chosen])
    if part == "train":
        return replace(dataset, train=chosen_split)
    return replace(dataset, test=chosen_split)
