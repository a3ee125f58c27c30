"""The curvature along a vector, sample by sample, by forward-mode differentiation.

With outputs z(t) at the parameters θ + t v and a loss that is a mean over samples,
`vᵀ ∇²L v = ∇L · z'' + z'ᵀ ∇²L z'`, and both terms are sums over samples. All samples of a
microbatch share one forward pass, where products with groups need a gradient and a product each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from hpc_absa.curvature import fast
from hpc_absa.curvature.operator import HessianOperator

TOLERANCE = 5e-3
"""Of the mean over all samples, which is known; with TensorFloat-32 products are right to 1e-3."""


def sample_curvatures(
    operator: HessianOperator, vector: Tensor, expected: float | None = None
) -> Tensor | None:
    """`vᵀ ∇²l_i v` of each sample i, [N] float64 (a collective).

    None, on all ranks, if the model or the loss does not allow it: a function without a forward
    derivative, outputs that are not tensors with an axis of samples, a denominator that is not the
    number of samples, or a weighted mean that is not `expected`.
    """
    operator.matvecs += 1  # what it costs, at least
    sums = torch.zeros(2, operator.samples, dtype=torch.float64)
    for index in operator.own_microbatches:
        start, stop = operator.bounds[index]
        try:
            sums[0, start:stop] = _of_microbatch(operator, index, vector)
        except Exception:  # products with groups of samples give the same
            sums[1, start:stop] = 1
    values, failed = operator.comm.allreduce_(sums)
    if failed.any():
        return None
    parts = zip(operator.factors, operator.bounds, strict=True)
    total = sum(factor * float(values[start:stop].sum()) for factor, (start, stop) in parts)
    mean = total / operator.samples
    if expected is not None and not abs(mean - expected) <= TOLERANCE * abs(expected):
        return None
    return values


def _of_microbatch(operator: HessianOperator, index: int, vector: Tensor) -> Tensor:
    """[n_m], of each of its samples."""
    inputs, targets = operator.load(index)
    start, stop = operator.bounds[index]
    direction = tuple(operator.shaped(vector))
    structure: Any = None

    def outputs(*parameters: Tensor) -> tuple[Tensor, ...]:
        nonlocal structure
        named = dict(zip(operator.parameters, parameters, strict=True))
        with _TwiceForward():
            result = fast.forward(operator.model, inputs, named, fast.PLAIN)
        tensors, structure = tree_flatten(result)
        if any(len(tensor) != stop - start for tensor in tensors):
            raise NotImplementedError("outputs without an axis of samples")
        return tuple(tensors)

    values = tuple(p.detach() for p in operator.parameters.values())
    # The direction's own derivative is zero; autograd takes longer with zeros that it makes itself.
    zeros = tuple(torch.zeros_like(p) for p in direction)

    def once(*pair: Tensor) -> Any:
        return jvp(outputs, pair[: len(values)], pair[len(values) :])

    twice: Any = jvp(once, (*values, *direction), (*direction, *zeros))
    (z, first), (_, second) = twice
    leaves = [tensor.detach().requires_grad_() for tensor in z]
    loss, denominator = operator.mean(index, tree_unflatten(leaves, structure), targets)
    if not math.isclose(denominator, operator.expected_denominator(index)):
        raise NotImplementedError("a weighted mean")
    slopes = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    bent = torch.autograd.grad(slopes, leaves, first, materialize_grads=True)
    terms = zip(slopes, second, bent, first, strict=True)
    each = [(g * b + h * a).detach().reshape(len(g), -1).sum(1) for g, b, h, a in terms]
    return torch.stack(each).sum(0).double().cpu() * (stop - start)


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
