"""Part of a training set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from hpc_absa.data.order import permutation
from hpc_absa.data.packed import PackedDataset, Split
from hpc_absa.errors import UsageError

SEED = 0
"""Of the choice: the same samples for every seed of a job."""


def training_subset(dataset: PackedDataset, count: int) -> PackedDataset:
    """`dataset` with `count` training samples, chosen at random but always the same.

    Pixels are copied into memory. The rest of the data set stays as it is.

    Raises:
        UsageError: there are fewer.
    """
    whole = dataset.train
    if count > len(whole):
        raise UsageError(
            f"data.train_samples = {count}: expected at most the {len(whole)} training samples of "
            f"{dataset.name}"
        )
    chosen = np.sort(permutation(SEED, 0, len(whole))[:count])
    images = whole.images.part(chosen) if dataset.is_encoded else whole.images[chosen]
    return replace(dataset, train=Split(images, whole.labels[chosen]))
