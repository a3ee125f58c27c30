"""The fast gradient sign method (Goodfellow et al., arXiv:1412.6572, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

Loss = Callable[[Any, Any], Any]
Call = Callable[[nn.Module, Any], Any]


def perturb(
    model: nn.Module,
    loss: Loss,
    inputs: Any,
    targets: Any,
    step: Tensor,
    valid: tuple[Tensor, Tensor] | None,
    count: int | None = None,
    call: Call = lambda model, inputs: model(inputs),
) -> Any:
    """`x + step · sign(∇ₓ loss)`, clamped to the valid range; new, shaped like `inputs`.

    The gradient is computed in evaluation mode, so that batch-norm statistics are neither used nor
    changed, and only with respect to the inputs, so that no parameter's `.grad` is changed. The
    model gets a copy of `inputs` in the same memory format, and can change it in place. It gets the
    whole batch, as in training, if its outputs depend on more than one sample or it does not take
    a part of the batch.

    Args:
        model: any module; its training flags are restored.
        loss: mean loss of (outputs, targets), or (sum, denominator).
        inputs: [n, ...], floating point, as the model takes them; or nested tensors, of which those
            of floating point are changed.
        targets: as the loss takes them.
        step: ε in the units of `inputs`, broadcastable to them (for ε in pixel units, ε divided by
            the normalization's standard deviation).
        valid: smallest and largest value of an input, each broadcastable to `inputs`; None: those
            of the batch.
        count: only the first `count` inputs are changed; all by default.
        call: how the model is called.
    """
    leaves, structure = tree_flatten(inputs)
    floats = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.is_floating_point()]
    n = len(leaves[floats[0]])
    count = n if count is None else count
    size = count if _is_sliceable(leaves, targets, n) else n
    if count == 1 or _uses_batch_statistics(model):
        size = n

    def gradients(size: int) -> list[Tensor]:
        parts = [x[:size] if size < n and isinstance(x, Tensor) else x for x in leaves]
        part = targets[:size] if size < n else targets

        def value(copies: list[Any]) -> Tensor:
            result = loss(call(model, tree_unflatten(copies, structure)), part)
            return result[0] if isinstance(result, tuple) else result

        return _gradients(model, parts, floats, value)

    try:
        found = gradients(size)
    except Exception:
        if size == n:
            raise
        found = gradients(n)
    for index, gradient in zip(floats, found, strict=True):
        x = leaves[index]
        low, high = valid or (x.amin(), x.amax())
        sign = gradient[:count].sign().nan_to_num_()  # 0 / 0 where a mean is over no targets
        moved = torch.clamp(x[:count] + step * sign, min=low, max=high)
        leaves[index] = torch.cat([moved, x[count:]]) if count < n else moved
    return tree_unflatten(leaves, structure)


def has_floats(inputs: Any) -> bool:
    """Whether there is something to change, in contrast to token ids."""
    return any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_leaves(inputs))


def _is_sliceable(leaves: list[Any], targets: Any, n: int) -> bool:
    """Whether a part of the batch can be made by slices."""
    tensors = [x for x in [*leaves, targets] if x is not None]
    return all(isinstance(x, Tensor) and x.dim() and len(x) == n for x in tensors)


def _uses_batch_statistics(model: nn.Module) -> bool:
    return any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules())


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients of parameters; flags are restored."""
    training = [module for module in model.modules() if module.training]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


def _gradients(
    model: nn.Module, leaves: list[Any], floats: list[int], value: Callable[[list[Any]], Tensor]
) -> list[Tensor]:
    """Of `value(leaves)` by the leaves at the indices `floats`."""
    # Without parameters that require grad, a plain `backward` is enough; `torch.autograd.grad`
    # does not work with reentrant activation checkpointing.
    with frozen(model):
        given = list(leaves)
        for index in floats:
            given[index] = leaves[index].detach().requires_grad_()
        # clones, which the model may change in place
        value([x.clone() if isinstance(x, Tensor) else x for x in given]).backward()
    return [torch.zeros_like(x) if x.grad is None else x.grad for x in (given[i] for i in floats)]
