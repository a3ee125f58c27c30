"""Data for long checks that is not part of the project: tests that need it skip without it."""

from __future__ import annotations

import io
import os
import tarfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

FOLDER = Path(os.environ.get("HPC_ABSA_SHARED_DATA") or
              Path(__file__).resolve().parents[2] / "shared" / "data")  # fmt: skip
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
"""By which the trained ResNet-20 expects its inputs to be normalised."""


def require(name: str) -> Path:
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{path} is not here (HPC_ABSA_SHARED_DATA names another folder)")
    return path


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x):
        kept = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + kept)


class ResNet20(nn.Module):
    """With the names of the trained weights."""

    def __init__(self, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, (inputs, outputs) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            first = Block(inputs, outputs, 1 if stage == 1 else 2)
            rest = [Block(outputs, outputs, 1) for _ in range(2)]
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.fc = nn.Linear(64, classes)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean(dim=(2, 3)))


def trained_resnet20() -> nn.Module:
    from hpc_absa.models.weights import read_weights

    model = ResNet20()
    arrays = read_weights(require("resnet20/weights.npz"))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return model.eval()


@cache
def images(every: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every so many of the sorted test images of the JPEG CIFAR-10: normalised, and classes."""
    from PIL import Image

    path = require("cifar10-jpeg.tar.xz")
    pixels = {}
    with tarfile.open(path, "r|xz") as file:
        for member in file:
            name = member.name.removeprefix("./")
            number = name.rpartition("/")[2].partition(".")[0]
            if member.isfile() and "test/" in name and int(number) % every == 0:
                stream = file.extractfile(member)
                assert stream is not None
                pixels[name] = np.asarray(Image.open(io.BytesIO(stream.read())).convert("RGB"))
    names = sorted(pixels)
    classes = sorted({name.split("/")[-2] for name in names})
    labels = torch.tensor([classes.index(name.split("/")[-2]) for name in names])
    stacked = torch.from_numpy(np.stack([pixels[name] for name in names])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (stacked.float() / 255 - mean) / std, labels


def valid_range() -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return -mean / std, (1 - mean) / std
