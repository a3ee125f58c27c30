"""Small networks to measure on, trained for some steps, and samples of their data.

Data are scikit-learn's digits, or CIFAR-10 images from a file that `hpc-absa data` has packed (or
`.npz` with `images` [N, 32, 32, 3] and `labels`). Without a file, networks for CIFAR-10 get random
images.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpc_absa import models
from hpc_absa.models.resnet import ResNet

NETWORKS = (
    "perceptron-5k", "perceptron", "digits-cnn", "encoder", "resnet20", "resnet20-pyhessian",
    "resnet18-cifar",
)  # fmt: skip


@dataclass
class Samples:
    """A Hessian sample in memory, drawn with replacement."""

    inputs: Tensor
    targets: Tensor
    population: float = math.inf

    @property
    def size(self) -> int:
        return len(self.inputs)

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.inputs[start:stop], self.targets[start:stop]

    def chosen(self, indices: Tensor) -> Samples:
        return Samples(self.inputs[indices].contiguous(), self.targets[indices].contiguous())


class Encoder(nn.Module):
    """A transformer encoder of two layers over the 8 rows of a digit."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, width), nn.Parameter(torch.zeros(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x[:, 0]) + self.position).mean(1))


class PyHessianResNet20(ResNet):
    """The ResNet-20 of PyHessian's repository: shortcuts by convolution, `.view` at the end."""

    def __init__(self) -> None:
        super().__init__(3, 10, [3, 3, 3], (16, 32, 64), "convolution")

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(torch.relu(self.bn(self.conv(x))))
        return self.classifier(functional.avg_pool2d(x, 8).view(len(x), -1))

    def load(self, path: Path) -> None:
        """Weights from an archive of arrays in the order of the state."""
        with np.load(path) as file:
            own = self.state_dict()
            arrays = [torch.from_numpy(file[name]) for name in file.files]
        self.load_state_dict(dict(zip(own, arrays, strict=True)))


def perceptron(*sizes: int) -> nn.Module:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def build(name: str) -> nn.Module:
    """One of `NETWORKS`, with new weights from torch's random state."""
    if name == "perceptron-5k":
        return perceptron(64, 64, 10)
    if name == "perceptron":
        return perceptron(64, 600, 600, 600, 10)
    if name == "encoder":
        return Encoder()
    if name == "resnet20-pyhessian":
        return PyHessianResNet20()
    if name == "digits-cnn":
        return models.build(name, {}, 1, 8, 10)
    return models.build(name, {}, 3, 32, 10)


def data(name: str, path: Path | None, count: int = 12500) -> Samples:
    """The training data of a network."""
    if name.startswith("resnet"):
        if path is None:
            return _random_images(min(count, 2000))
        if path.suffix == ".npz":
            with np.load(path) as file:
                images, labels = file["images"], file["labels"]
        else:
            with h5py.File(path) as file:  # which may be sorted by class
                every = max(1, len(file["train/labels"]) // count)
                images, labels = file["train/images"][::every], file["train/labels"][::every]
        inputs = torch.from_numpy(images)
        if inputs.shape[-1] == 3:
            inputs = inputs.permute(0, 3, 1, 2)
        inputs = (inputs.float() / 255 - 0.47) / 0.25
        return Samples(inputs.contiguous(), torch.from_numpy(labels.astype(np.int64)))
    from sklearn.datasets import load_digits

    digits = load_digits()
    inputs = torch.from_numpy(digits.images[:1437]).float()[:, None] / 16 - 0.3
    return Samples(inputs, torch.from_numpy(digits.target[:1437]).long())


def _random_images(count: int) -> Samples:
    """Ten random images with noise, [N, 3, 32, 32]."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 10
    classes = torch.randn(10, 3, 32, 32, generator=generator)
    noise = torch.randn(count, 3, 32, 32, generator=generator)
    return Samples(0.3 * classes[labels] + noise, labels)


def drawn(pool: Samples, count: int, seed: int, replacement: bool = True) -> Samples:
    """A random sample."""
    generator = torch.Generator().manual_seed(seed)
    if replacement:
        chosen = torch.randint(0, pool.size, (count,), generator=generator)
    else:
        chosen = torch.randperm(pool.size, generator=generator)[:count]
    return pool.chosen(chosen.to(pool.inputs.device))


def parser(description: str | None, **defaults: object) -> argparse.ArgumentParser:
    """Arguments that choose networks at stages of their training, for `stages`."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--data", type=Path, help="packed CIFAR-10, for the ResNets")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after")
    parser.set_defaults(**defaults)
    return parser


def stages(options: argparse.Namespace) -> Iterator[tuple[str, int, nn.Module, Samples, float]]:
    """Name (with steps), seed, network, data, and the time at which the stage should end."""
    begin = time.perf_counter()
    chosen = [(n, s, r) for n in options.networks for s in options.steps for r in options.seeds]
    for number, (name, steps, seed) in enumerate(chosen, 1):
        if time.perf_counter() > begin + options.seconds:
            return
        model, pool = trained(name, options.data, steps=steps, seed=seed, device=options.device)
        end = begin + options.seconds * number / len(chosen)
        yield f"{name}, {steps} steps", seed, model, pool, end


def trained(
    name: str, path: Path | None = None, *, steps: int, seed: int = 0, device: str = "cpu"
) -> tuple[nn.Module, Samples]:
    """A network after some steps of SGD on its data, in evaluation mode, and the data."""
    torch.manual_seed(seed)
    pool = data(name, path)
    pool = Samples(pool.inputs.to(device), pool.targets.to(device))
    model = build(name).to(device)
    lr, batch = (0.1, 32) if name.startswith("resnet") else (0.05, 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    for _ in range(steps):
        chosen = pool.chosen(torch.randint(0, pool.size, (batch,)).to(device))
        optimizer.zero_grad()
        functional.cross_entropy(model(chosen.inputs), chosen.targets).backward()
        optimizer.step()
    model.zero_grad()
    return model.eval(), pool
