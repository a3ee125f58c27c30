"""The network and the data of the benchmark, as the job names them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from torch import nn

from hpc_absa.data.sources import Source
from hpc_absa.models import build
from tests.soak.watched import FOLDER, Watcher

TRAINING, TEST = 20_000, 200


def network(channels: int, classes: int, image_size: int) -> nn.Module:
    """ResNet-8, whose ranks record what they do."""
    if folder := os.environ.get(FOLDER):
        Watcher(Path(folder)).attach()
    return build("resnet8", {}, channels, image_size, classes)


def images() -> Source:
    """Random images of the size of CIFAR-10's."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (TRAINING + TEST, 3, 32, 32), np.uint8)
    labels = np.arange(TRAINING + TEST) % 10
    cut = TRAINING
    return Source.from_arrays(pixels[:cut], labels[:cut], pixels[cut:], labels[cut:])
