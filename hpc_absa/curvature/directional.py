"""The curvature along a vector, group by group of samples, by forward-mode differentiation alone.

`vᵀ ∇²L_g v` is the second derivative of `t ↦ L_g(θ + t v)`. All groups of a microbatch share one
forward pass, where products with their Hessians would need a gradient and a product for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp
from torch.overrides import TorchFunctionMode

from hpc_absa.curvature import fast
from hpc_absa.curvature.loss import mean_and_denominator, take
from hpc_absa.curvature.operator import HessianOperator
from hpc_absa.curvature.sampling import Scatter
from hpc_absa.curvature.twice import Exchange

TOLERANCE = 5e-3
"""Of the mean over all groups, which is known; products with TensorFloat-32 are right to 1e-3."""


def group_scatter(
    operator: HessianOperator, vector: Tensor, size: int, expected: float
) -> Scatter | None:
    """`vᵀ ∇²L_g v` for groups of `size` samples.

    None, on all ranks, if the model or the loss does not allow it: a function without forward
    derivative, outputs without an axis of samples, or a mean that is not `expected`.
    """
    groups = [
        (index, first, min(first + size, stop))
        for index, (start, stop) in enumerate(operator.bounds)
        for first in range(start, stop, size)
    ]
    sums = torch.zeros(3, len(groups), dtype=torch.float64)
    for index in operator.own_microbatches:
        own = [k for k, group in enumerate(groups) if group[0] == index]
        start = operator.bounds[index][0]
        parts = [torch.arange(groups[k][1] - start, groups[k][2] - start) for k in own]
        try:
            sums[0, own], sums[1, own] = _of_microbatch(operator, index, vector, parts)
        except Exception:  # the products below give the same
            sums[2, own] = 1
    values, denominators, failed = operator.comm.allreduce_(sums)
    if failed.any() or not denominators.any():
        return None
    scatter = Scatter(values, denominators / denominators.sum())
    return scatter if abs(scatter.mean - expected) <= TOLERANCE * abs(expected) else None


def _of_microbatch(
    operator: HessianOperator, index: int, vector: Tensor, parts: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Values and denominators of its groups, [G] each."""
    inputs, targets = operator.load(index)
    direction = operator.shaped(vector)
    denominators: list[float] = []

    def losses(t: Tensor) -> Tensor:
        leaves = {
            name: p.detach() + t * v
            for (name, p), v in zip(operator.parameters.items(), direction, strict=True)
        }
        with _TwiceForward():
            outputs = fast.forward(operator.model, inputs, leaves, fast.PLAIN)
        results = []
        denominators.clear()
        for part in parts:
            total = sum(map(len, parts))
            chosen, axis = take(outputs, part, total)
            chosen_targets, target_axis = take(fast.copied(targets), part, total)
            if not axis or target_axis is False:
                raise ValueError("no axis of samples")
            with _TwiceForward(), Exchange():
                mean, d = mean_and_denominator(operator.loss_fn, chosen, chosen_targets, len(part))
            results.append(mean)
            denominators.append(d)
        return torch.stack(results)

    def slope(t: Tensor) -> Any:
        return jvp(losses, (t,), (torch.ones_like(t),))[1]

    zero = torch.zeros((), dtype=operator.dtype, device=operator.device)
    values = jvp(slope, (zero,), (torch.ones_like(zero),))[1]
    return values.double().cpu(), torch.tensor(denominators, dtype=torch.float64)


class _TwiceForward(TorchFunctionMode):
    """Replaces or refuses what torch differentiates wrongly twice in forward mode (2.13)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm:
            return _layer_norm(*args, **kwargs)
        training = func is F.batch_norm and fast.NormalizationCall(*args, **kwargs).training
        if training or func in _WRONG:
            raise NotImplementedError(func.__name__)
        return func(*args, **kwargs)


_WRONG = {F.instance_norm, torch.instance_norm, torch.batch_norm, torch.layer_norm}


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    axes = list(range(-len(normalized_shape), 0))
    centred = input - input.mean(axes, keepdim=True)
    output = centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)
    output = output if weight is None else output * weight
    return output if bias is None else output + bias
