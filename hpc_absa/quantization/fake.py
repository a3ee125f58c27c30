"""Fake quantization: weights and activations take few values, the arithmetic stays float32.

The gradient passes through the rounding unchanged (straight-through), and is zero where an
activation was clipped.

Shapes:
    O  output channels
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from hpc_absa.quantization.graph import Network

SAMPLED = 1 << 16
"""Activations of a layer, at equal distances, from which its range is chosen."""

SHRINK = tuple(1 - 0.05 * i for i in range(17))
"""Candidates for a range, as parts of the whole one."""


def quantized_weight(weight: Tensor, bits: int) -> Tensor:
    """Symmetric and uniform, one scale for each output channel (the first dimension).

    `s_o = max |W_o| / (2^(bits − 1) − 1)`, and `s_o · round(W_o / s_o)`.
    """
    levels = 2 ** (bits - 1) - 1
    scale = weight.detach().flatten(1).abs().amax(1) / levels
    scale = scale.clamp_min(torch.finfo(weight.dtype).tiny).view(-1, *(1,) * (weight.dim() - 1))
    rounded = (weight.detach() / scale).round() * scale
    return weight + (rounded - weight).detach()


def quantized_activation(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Uniform between `low` and `high`, with zero among the 2^bits values."""
    scale = ((high - low) / (2**bits - 1)).clamp_min(torch.finfo(x.dtype).tiny)
    zero = (low / scale).round()
    low, high = zero * scale, (zero + 2**bits - 1) * scale
    clipped = x.clamp(low, high)
    rounded = (clipped.detach() / scale).round() * scale
    return clipped + (rounded - clipped).detach()


def squared_error(weight: Tensor, bits: int) -> float:
    """`‖Q(W) − W‖²`, in float64."""
    return float((quantized_weight(weight, bits).double() - weight.double()).square().sum())


@dataclass(frozen=True)
class Range:
    """Values of a layer's input, before quantization."""

    low: float
    high: float


class FakeQuantized(nn.Module):
    """A convolution or linear layer with quantized weight and input; the bias stays float32."""

    low: Tensor
    high: Tensor

    def __init__(self, layer: nn.Module, weight_bits: int, activation_bits: int, range_: Range):
        super().__init__()
        self.layer, self.weight_bits, self.activation_bits = layer, weight_bits, activation_bits
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.register_buffer("low", weight.new_tensor(range_.low))
        self.register_buffer("high", weight.new_tensor(range_.high))

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_bits:
            x = quantized_activation(x, self.low, self.high, self.activation_bits)
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return functional_call(
            self.layer, {"weight": quantized_weight(weight, self.weight_bits)}, (x,)
        )


def shifted(network: Network, name: str, bits: int, factor: float) -> fx.GraphModule:
    """A copy of the folded network in which the weight W of one layer is `W + factor (Q(W) − W)`.

    The mean of the losses with factors 1 and -1, less that without, is the quadratic part of the
    rise, in which the gradient at W is not.
    """
    graph = copy.deepcopy(network.folded)
    weight = graph.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    with torch.no_grad():
        weight.add_(quantized_weight(weight, bits) - weight, alpha=factor)
    return graph.eval()


Ranges = Mapping[str, Mapping[int, Range]]
"""Of each layer's input, by layer and bits."""


def quantized(network: Network, bits: Mapping[str, int], ranges: Ranges | None) -> fx.GraphModule:
    """A copy of the folded network whose layers in `bits` are quantized.

    Args:
        network: the float model.
        bits: of weights and inputs, by layer; other layers stay float32.
        ranges: of the inputs; None leaves all inputs float32.
    """
    graph = copy.deepcopy(network.folded)
    for name, number in bits.items():
        parent, _, last = name.rpartition(".")
        layer = graph.get_submodule(name)
        range_ = ranges[name][number] if ranges else Range(0.0, 0.0)
        wrapped = FakeQuantized(layer, number, number if ranges else 0, range_)
        setattr(graph.get_submodule(parent), last, wrapped)
    return graph.eval()


def calibrate(
    network: Network, batches: Iterable[Tensor], bits: Iterable[int]
) -> dict[str, dict[int, Range]]:
    """Ranges of each layer's input on samples: those with the least squared error.

    Args:
        network: the float model, whose activations are used.
        batches: inputs, on the model's device.
        bits: to choose ranges for.
    """
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in network.layers}
    extremes: dict[str, list[Tensor]] = {layer.name: [] for layer in network.layers}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            flat = args[0].detach().flatten()
            extremes[name].append(torch.stack([flat.min(), flat.max()]))
            seen[name].append(_sampled(flat))

        return hook

    hooks = [
        network.folded.get_submodule(name).register_forward_pre_hook(keep(name)) for name in seen
    ]
    try:
        with torch.no_grad():
            for inputs in batches:
                network.folded(inputs)
    finally:
        for handle in hooks:
            handle.remove()
    chosen: dict[str, dict[int, Range]] = {}
    for name, parts in seen.items():
        values = _sampled(torch.cat(parts))
        outer = torch.stack(extremes[name])
        low, high = outer[:, 0].min().clamp_max(0), outer[:, 1].max().clamp_min(0)
        chosen[name] = {b: _best_range(values, low, high, b) for b in dict.fromkeys(bits)}
    return chosen


def _sampled(values: Tensor) -> Tensor:
    """Some `SAMPLED` values at equal distances, from all columns, rows and channels of images."""
    stride = max(1, len(values) // SAMPLED)
    while math.gcd(stride, len(values)) > 1:
        stride += 1
    return values[::stride]


def _best_range(values: Tensor, low: Tensor, high: Tensor, bits: int) -> Range:
    errors = [
        float((quantized_activation(values, f * low, f * high, bits) - values).square().sum())
        for f in SHRINK
    ]
    factor = SHRINK[errors.index(min(errors))]
    return Range(float(factor * low), float(factor * high))
