"""Small nets, their samples and dense Hessians."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hpc_absa.curvature.operator import trainable_parameters


class Samples:
    """A Hessian sample held in memory, and candidates for one."""

    def __init__(self, inputs: Tensor, targets: Tensor, population: float = math.inf) -> None:
        self.inputs, self.targets, self.size = inputs, targets, len(inputs)
        self.population = population

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.inputs[start:stop], self.targets[start:stop]

    def chosen(self, indices: Tensor) -> Samples:
        return Samples(self.inputs[indices], self.targets[indices], self.population)


class ConvNet(nn.Module):
    """Convolutions with folded, unfolded and shared-output normalization, grouped and strided."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(4)
        self.third = nn.Conv2d(4, 4, 1)
        self.bn3 = nn.BatchNorm2d(4, affine=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.first(x)))
        y = self.second(x)
        x = torch.tanh(self.bn2(y) + y)
        x = torch.relu(self.bn3(self.third(x)) + x)
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Embedding, attention, dropout, and an output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8)
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.3, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x))).mean(1)


def _mlp() -> nn.Module:
    net = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)
    )
    net[0].bias.requires_grad_(False)
    return net


class Recurrent(nn.Module):
    """An LSTM over the columns of what a convolution returns, taken with `.view`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4)
        self.rnn, self.head = nn.LSTM(9, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.conv(x))).view(len(x), 4, 9)
        return self.head(self.rnn(x)[0][:, -1])


class WeightedLoss:
    """Cross entropy with class weights, divided by the weights of the targets."""

    weight = torch.tensor([0.2, 1.0, 3.0])

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, weight=self.weight.to(outputs))

    def denominator(self, targets: Tensor) -> Tensor:
        return self.weight[targets].sum()


def build(kind: str, samples: int = 24, dtype: torch.dtype = torch.float64) -> tuple:
    """(model in training mode, loss, sample), seeded.

    Kinds: conv, attention, mlp, recurrent, and weighted, which is mlp with class weights.
    """
    generator = torch.Generator().manual_seed(3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        models = {"conv": ConvNet, "attention": Attention, "recurrent": Recurrent}
        model = models.get(kind, _mlp)()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    if kind == "attention":
        inputs = torch.randint(0, 7, (samples, 5), generator=generator)
        targets = torch.randint(0, 7, (samples,), generator=generator)
    else:
        shape = (samples, 3, 8, 8) if kind in ("conv", "recurrent") else (samples, 6)
        inputs = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        targets = torch.randint(0, 3, (samples,), generator=generator)
    loss = WeightedLoss() if kind == "weighted" else nn.functional.cross_entropy
    return model.to(dtype), loss, Samples(inputs, targets)


def dense(model: nn.Module, loss_fn: Callable, sample: Samples, samples: int) -> Tensor:
    """The Hessian [P, P] in float64, by autograd alone, in evaluation mode."""
    names = trainable_parameters(model)
    sizes = [p.numel() for p in names.values()]
    inputs, targets = sample.load(0, samples)
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    training = model.training
    rest = {n: t.detach().double() for n, t in model.named_buffers()}
    rest |= {n: p.detach().double() for n, p in model.named_parameters() if n not in names}

    def loss(flat: Tensor) -> Tensor:
        pieces = flat.split(sizes)
        own = {n: v.view_as(p) for (n, p), v in zip(names.items(), pieces, strict=True)}
        return loss_fn(functional_call(model, {**own, **rest}, (inputs,)), targets)

    flat = torch.cat([p.detach().double().reshape(-1) for p in names.values()])
    model.eval()
    try:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.jacrev(torch.func.grad(loss))(flat)
    finally:
        model.train(training)


def autograd_hessian(
    model: nn.Module,
    loss_fn: Callable,
    sample: Samples,
    samples: int,
    exchanged: bool = False,
    vectors: Tensor | None = None,
) -> Tensor:
    """The Hessian [P, P] by double backward on the model's own parameters, on one batch.

    With `vectors` [n, P] their products with it. With `exchanged`, hardsigmoid is a piecewise
    linear function and nothing is checkpointed.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    flags = [(module, module.training) for module in model.modules()]
    inputs, targets = sample.load(0, samples)

    def flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in tensors])

    def gradient(value: Tensor, create_graph: bool) -> Tensor:
        if not value.requires_grad:
            return flat([torch.zeros_like(p) for p in parameters])
        options = {"create_graph": create_graph, "retain_graph": True, "materialize_grads": True}
        return flat(torch.autograd.grad(value, parameters, **options))

    def hardsigmoid(x: Tensor, inplace: bool = False) -> Tensor:
        return (x / 6 + 0.5).clamp(0, 1)

    model.eval()
    with ExitStack() as stack:
        if exchanged:
            run = mock.patch(
                "torch.utils.checkpoint.checkpoint", lambda f, *x, use_reentrant: f(*x)
            )
            stack.enter_context(run)
            stack.enter_context(mock.patch.object(nn.functional, "hardsigmoid", hardsigmoid))
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        try:
            first = gradient(loss_fn(model(copy.deepcopy(inputs)), targets), True)
            entries = first if vectors is None else vectors @ first
            return torch.stack([gradient(entry, False) for entry in entries]).detach()
        finally:
            for module, training in flags:
                module.training = training
