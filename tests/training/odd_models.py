"""User-defined models, losses and data that cannot be trained, or only in part."""

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


def flat(*layers):
    return nn.Sequential(nn.Flatten(), *layers)


def compiled():
    return torch.compile(flat(nn.Linear(64, 4)), backend="aot_eager")


def scripted():
    return torch.jit.script(flat(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 4)))


class ComplexWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 4, dtype=torch.complex64) / 8)

    def forward(self, x):
        return (x.flatten(1).to(torch.complex64) @ self.weight).abs()


class SparseEmbedding(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.last = nn.Embedding(8, 4, sparse=True), nn.Linear(64, 4)

    def forward(self, x):
        return self.last(x.flatten(1)) + self.embedding((x[:, 0, 0, 0] > 0).long())


class ExtraState(nn.Linear):
    def __init__(self):
        super().__init__(64, 4)

    def forward(self, x):
        return super().forward(x.flatten(1))

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


class CustomFunction(torch.autograd.Function):
    """Without a double backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * (1 - ctx.saved_tensors[0].tanh() ** 2)


class OnceDifferentiable(nn.Module):
    def __init__(self):
        super().__init__()
        self.last = nn.Linear(64, 4)

    def forward(self, x):
        return CustomFunction.apply(self.last(x.flatten(1)))


class Returning(nn.Module):
    """Returns something else in evaluation mode."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.last = kind, nn.Linear(64, 4)

    def forward(self, x):
        outputs = self.last(x.flatten(1))
        if self.training:
            return outputs
        return {"dict": {"logits": outputs}, "one": outputs[:, 0], "few": outputs[:, :2]}[self.kind]


def lazy():
    return flat(nn.LazyLinear(4))


def narrow():
    return flat(nn.Linear(63, 4))


def two_outputs():
    return flat(nn.Linear(64, 2))


def failing():
    raise KeyError("HOME_OF_THE_WEIGHTS")


def without_parameters_used():
    model = flat(nn.Linear(64, 4))
    return model.requires_grad_(False).append(Detached())


class Detached(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x.detach()


class Plain(nn.Sequential):
    """Trains; leaves traces in every place that a forward pass can reach."""

    def __init__(self):
        super().__init__(
            nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4)
        )
        self.calls = 0
        self.cache = None
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("peak", torch.zeros(()), persistent=False)
        self.target = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x):
        self.calls += 1
        self.cache = str(self.calls)
        self.average += x.mean()
        self.peak.data.fill_(float(x.max()))
        self.target.data += 1
        random.random()
        np.random.random()
        x += 0.0  # in place
        return super().forward(x)


def unreduced(outputs, targets):
    return F.cross_entropy(outputs, targets, reduction="none")


def number(outputs, targets):
    return float(F.cross_entropy(outputs, targets))


def infinite(outputs, targets):
    return F.cross_entropy(outputs, targets) / 0.0


def raising(outputs, targets):
    return outputs.nothing


def constant(outputs, targets):
    return torch.tensor(1.0)


def broken_blocks():
    raise FileNotFoundError("no such archive: digits.tar")
