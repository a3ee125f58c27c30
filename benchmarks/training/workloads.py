"""What all contenders train: data sets, a transformer, and the job files that name them."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from hpc_absa.data.sources import Source

SAMPLES = 65536
"""An epoch is longer than a turn, so that its end, where a run is saved, is in few of them."""
VOCABULARY, CONTEXT = 256, 64


def images() -> Source:
    """Random images of CIFAR-10's shape."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (SAMPLES, 3, 32, 32), dtype=np.uint8)
    labels = random.integers(0, 10, SAMPLES)
    labels[:10] = range(10)
    classes = [str(number) for number in range(10)]
    return Source.from_arrays(pixels, labels, pixels[:256], labels[:256], classes=classes)


def tokens() -> TensorDataset:
    """Random token ids, and those that follow them."""
    generator = torch.Generator().manual_seed(0)
    lines = torch.randint(0, VOCABULARY, (SAMPLES, CONTEXT + 1), generator=generator)
    return TensorDataset(lines[:, :-1], lines[:, 1:])


class Transformer(nn.Module):
    """A causal language model of 4 layers; [b, T] to [b, V, T], as cross entropy takes it."""

    def __init__(self, width: int = 128, layers: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, VOCABULARY)
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, lines: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(lines) + self.position
        return self.out(self.encoder(hidden, self.mask, is_causal=True)).transpose(1, 2)


IMAGES = """
[data]
name = "benchmarks.training.workloads:images"
root = "{folder}/images.h5"
padding = 4
flip = true
"""
MODELS = {
    "ResNet-8": (128, IMAGES + '[model]\nname = "resnet8"\n[train]\nweight_decay = 5e-4\n'),
    "ResNet-18": (16, IMAGES + '[model]\nname = "resnet18-cifar"\n[train]\nweight_decay = 5e-4\n'),
    "transformer": (
        16,
        '[data]\nname = "benchmarks.training.workloads:tokens"\n'
        '[model]\nname = "benchmarks.training.workloads:Transformer"\n'
        '[train]\noptimizer = "adamw"\nweight_decay = 0.01\nmetrics = []\n',
    ),
}
"""By name: samples of a microbatch, and the job's tables; `[train]` is the last one."""


def job(model: str, ranks: int, threads: int, folder: str, channels_last: bool) -> str:
    """A job file of one microbatch a rank and step, and a constant batch."""
    microbatch, tables = MODELS[model]
    return f"""
name = "throughput"
{tables.format(folder=folder)}
epochs = 1000
microbatch = {microbatch}
lr = 0.001
threads_per_rank = {threads}
device = "cpu"
channels_last = {"true" if channels_last else "false"}
[schedule]
method = "bl"
base_batch = {microbatch * ranks}
max_batch = {microbatch * ranks}
[ranks]
max = {ranks}
[checkpoint]
every_seconds = 86400
"""
