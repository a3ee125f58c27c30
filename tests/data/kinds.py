"""Data sets of many kinds, as a user writes them, with a model and a loss for each."""

import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from hpc_absa.curvature.fast import Arguments
from hpc_absa.data.datasets import Datasets
from hpc_absa.data.sources import Source

SAMPLES, TEST, VOCABULARY = 41, 19, 11


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


class Text(Dataset):
    """Token ids of different lengths; the target of a token is the next one."""

    def __init__(self, count, seed):
        g = generator(seed)
        self.lengths = torch.randint(3, 9, (count,), generator=g).tolist()
        self.tokens = [torch.randint(0, VOCABULARY, (n + 1,), generator=g) for n in self.lengths]

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"tokens": self.tokens[index], "name": f"line {index}"}


def pad(samples):
    """Inputs as a dictionary, targets with -100 where there is no token."""
    rows = [sample["tokens"] for sample in samples]
    inputs = nn.utils.rnn.pad_sequence([row[:-1] for row in rows], batch_first=True)
    targets = nn.utils.rnn.pad_sequence(
        [row[1:] for row in rows], batch_first=True, padding_value=-100
    )
    return {"ids": inputs, "names": [sample["name"] for sample in samples]}, targets


def text():
    return Datasets(Text(SAMPLES, 0), Text(TEST, 1), pad, classes=VOCABULARY)


def lists():
    """Batches of hundreds of tensors, of a data set of thousands."""
    return Datasets(Text(3000, 0), Text(TEST, 1), as_list)


def as_list(samples):
    return [sample["tokens"] for sample in samples] * 40, None


class LanguageModel(nn.Module):
    def __init__(self, classes, width=6):
        super().__init__()
        self.embedding = nn.Embedding(classes, width)
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, inputs):
        return self.head(self.recurrent(self.embedding(inputs["ids"]))[0])


def tensors(count, seed, targets):
    inputs = torch.randn(count, 5, generator=generator(seed))
    return TensorDataset(inputs, targets(inputs))


def regression():
    def targets(x):
        return (3 * x.sum(1)).round().long()  # integers, which are no classes

    return tensors(SAMPLES, 0, targets), tensors(TEST, 1, targets)


def multi_label():
    def targets(x):
        return (x[:, :3] > 0).float()

    return tensors(SAMPLES, 0, targets), tensors(TEST, 1, targets)


def array_regression():
    """The same as plain arrays, with numbers that are no integers."""
    parts = [part.tensors for part in regression()]
    return Source.from_arrays(*[array for x, y in parts for array in (x, y / 3)])


def array_labels():
    return Source.from_arrays(*[array for part in multi_label() for array in part.tensors])


def without_test():
    return regression()[0]


def perceptron(channels: int, outputs: int = 1):
    return nn.Sequential(nn.Linear(channels, 6), nn.Tanh(), nn.Linear(6, outputs))


class Augmented(Dataset):
    """Draws from the three global generators, as users' augmentations do."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = torch.tensor([random.random(), np.random.random()])
        return torch.cat([torch.rand(2), noise, torch.tensor([float(index)])])


def noisy_collate(samples):
    batch = torch.stack(samples)
    return batch, batch + torch.rand(batch.shape)


def augmented():
    return Datasets(Augmented(), Augmented(), noisy_collate, input_range=(0.0, 1.0))


class Pair(Dataset):
    """Two named inputs and no target."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        return {"a": torch.full((2,), float(index)), "b": np.float32(index)}


def pairs():
    return Datasets(Pair(), Pair(), as_arguments)


def as_arguments(samples):
    batch = torch.utils.data.default_collate(samples)
    return Arguments((batch["a"] / 40,), {"b": batch["b"] / 40}), None


class TwoInputs(nn.Module):
    """Returns two outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 1), nn.Parameter(torch.zeros(()))

    def forward(self, a, *, b):
        return {"sum": self.a(a)[:, 0] + self.b * b, "b": b}


def reconstruction(outputs, targets):
    """A weighted mean of two outputs, without targets."""
    weights = 1 + outputs["b"]
    return (weights * (outputs["sum"] - 1) ** 2).sum(), weights.sum()


def largest(outputs, targets):
    return outputs["sum"].max()


# What is refused


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1, 2])


def stream():
    return Stream()


class Unseeded(Augmented):
    def __getitem__(self, index):
        return torch.from_numpy(np.random.default_rng().random(3))


def unseeded():
    return Unseeded()


def ragged():
    return Datasets(Text(SAMPLES, 0))


def closure():
    class Local(Augmented):
        pass

    return Local()


def nothing():
    return [1, 2, 3]


class Breaks(Augmented):
    def __getitem__(self, index):
        if index == 7:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def breaks():
    return Breaks()
