"""Small random models from a list of layers, and a plain PyTorch loop to compare a run with."""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

WIDTH, SIZE, CLASSES, B = 4, 4, 3, 6


class Twice(nn.Module):
    """Calls its layer twice."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(self.layer(x))


class Sometimes(nn.Module):
    """Calls its layer in some forward passes only, as stochastic depth does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) if torch.rand(()) < 0.5 else x


class Never(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return x


class Checkpointed(nn.Module):
    """Computes its layer again in the backward pass."""

    def __init__(self, layer, reentrant):
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


class Frozen(nn.Module):
    """Keeps its layer in evaluation mode in its own `train`."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2.0)

    def train(self, mode=True):
        super().train(mode)
        self.layer.eval()
        return self

    def forward(self, x):
        return self.layer(x)


class Centre(nn.Module):
    """Subtracts a moving average, which it replaces, and counts its calls in place."""

    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mask", torch.full((WIDTH,), -torch.inf))

    def forward(self, x):
        if self.training:
            self.average = 0.9 * self.average + 0.1 * x.detach().mean(dim=(0, 2, 3))
            self.calls += 1
        return x * self.average.exp()[:, None, None] - self.average[:, None, None]


class ThroughData(nn.Module):
    """Changes its buffer in a way that PyTorch does not count."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.largest.data.copy_(torch.maximum(self.largest, x.detach().abs().max()))
        return x / (1 + self.largest)


class Functional(nn.Module):
    """Batch norm on its own buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("var", torch.ones(WIDTH))

    def forward(self, x):
        return F.batch_norm(x, self.mean, self.var, training=self.training)


class SharedBuffers(nn.Module):
    """Two batch norms with the same running statistics."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH)
        self.second.running_mean = self.first.running_mean
        self.second.running_var = self.first.running_var

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(WIDTH, WIDTH, 1, bias=b) for b in (True, False))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def conv():
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1)


def block():
    return nn.Sequential(conv(), nn.BatchNorm2d(WIDTH), nn.Tanh())


def shared_checkpoint():
    """One layer in two checkpoints: its gradients are added to twice with the reentrant kind."""
    layer = block()
    return nn.Sequential(Checkpointed(layer, True), Checkpointed(layer, True))


LAYERS = {
    "conv": conv,
    "batch norm": lambda: nn.BatchNorm2d(WIDTH),
    "momentum": lambda: nn.BatchNorm2d(WIDTH, momentum=0.4),
    "cumulative": lambda: nn.BatchNorm2d(WIDTH, momentum=None),
    "untracked": lambda: nn.BatchNorm2d(WIDTH, track_running_stats=False),
    "frozen": lambda: Frozen(nn.BatchNorm2d(WIDTH)),
    "instance norm": lambda: nn.InstanceNorm2d(WIDTH, affine=True, track_running_stats=True),
    "instance norm, no momentum": lambda: nn.InstanceNorm2d(
        WIDTH, momentum=None, track_running_stats=True
    ),
    "group norm": lambda: nn.GroupNorm(2, WIDTH),
    "twice": lambda: Twice(block()),
    "cumulative twice": lambda: Twice(nn.BatchNorm2d(WIDTH, momentum=None)),
    "sometimes": lambda: Sometimes(nn.BatchNorm2d(WIDTH)),
    "never": lambda: Never(nn.BatchNorm2d(WIDTH)),
    "checkpointed": lambda: Checkpointed(block(), False),
    "reentrant": lambda: Checkpointed(block(), True),
    "reentrant, shared": shared_checkpoint,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(conv()),
    "spectral norm, hooks": lambda: nn.utils.spectral_norm(conv()),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(conv()),
    "moving average": Centre,
    "through .data": ThroughData,
    "functional": Functional,
    "shared buffers": SharedBuffers,
    "tied": Tied,
    "in place": lambda: nn.Sequential(conv(), nn.ELU(inplace=True)),
    "dropout": lambda: nn.Dropout2d(0.3),
}


def build(seed, names=None):
    """A model of up to six of the layers, or of these."""
    choice = random.Random(seed)
    names = names or choice.choices(sorted(LAYERS), k=choice.randint(2, 6))
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, padding=1),
        *(LAYERS[name]() for name in names),
        nn.Flatten(),
        nn.Linear(WIDTH * SIZE**2, CLASSES),
    )
    return model.train()


def data(steps, per_step, seed=7, dtype=torch.float32):
    """[steps][per_step] microbatches."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [
            (
                torch.randn(B, 1, SIZE, SIZE, generator=generator, dtype=dtype) * (1 + k) + k,
                torch.randint(0, CLASSES, (B,), generator=generator),
            )
            for k in range(per_step)
        ]
        for _ in range(steps)
    ]


def plain_loop(model, steps, lr, seed_of):
    """PyTorch's own loop; with several microbatches the rule of `ModelBuffers` by definition.

    Every microbatch starts from a copy of the model as it was before the step. Buffers become the
    mean of what the copies have.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    index = 0
    for microbatches in steps:
        optimizer.zero_grad()
        left = []
        for inputs, targets in microbatches:
            copied, kept = _forward_backward(
                model, inputs, targets, len(microbatches), seed_of(index)
            )
            left.append(kept)
            for p, q in zip(model.parameters(), copied, strict=True):
                if q is not None:
                    p.grad = q if p.grad is None else p.grad + q
            index += 1
        optimizer.step()
        for name, buffer in model.named_buffers():
            buffer.copy_(_mean([values[name] for values in left], buffer))


def _forward_backward(model, inputs, targets, count, seed):
    """The gradients, and the buffers after the forward pass; the model is left as it was."""
    before = {name: b.detach().clone() for name, b in model.named_buffers()}
    grads = [p.grad for p in model.parameters()]
    for p in model.parameters():
        p.grad = None
    torch.manual_seed(seed)
    loss = F.cross_entropy(model(inputs), targets)
    after = {name: b.detach().clone() for name, b in model.named_buffers()}
    if count == 1 and not any(isinstance(m, Checkpointed) for m in model.modules()):
        (loss / count).backward()  # nothing but PyTorch
    else:
        # activation checkpointing computes the forward pass again, from the same buffers
        _set_buffers(model, before)
        (loss / count).backward()
    result = [p.grad for p in model.parameters()]
    for p, grad in zip(model.parameters(), grads, strict=True):
        p.grad = grad
    _set_buffers(model, before)
    return result, after


def _set_buffers(model, values):
    """As new tensors: the graph may need those of now."""
    ids = {}
    for prefix, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            full = f"{prefix}.{name}" if prefix else name
            if full in values:
                ids[id(buffer)] = values[full].clone()
            setattr(module, name, ids[id(buffer)])


def _mean(values: list[Tensor], start: Tensor) -> Tensor:
    mean = torch.stack([value.double() for value in values]).mean(dim=0)
    if start.is_floating_point():
        return mean.to(start.dtype)
    return (start + (mean - start).ceil()).to(start.dtype)
