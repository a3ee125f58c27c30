"""The fast gradient sign method (Goodfellow et al., arXiv:1412.6572, section 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Loss = Callable[[Any, Any], Any]


def perturb(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Any,
    step: Tensor,
    valid: tuple[Tensor, Tensor],
    count: int | None = None,
) -> Tensor:
    """`x + step · sign(∇ₓ loss)`, clamped to the valid range; a new tensor shaped like `inputs`.

    The gradient is computed in evaluation mode, so that batch-norm statistics are neither used nor
    changed, and only with respect to the inputs, so that no parameter's `.grad` is changed. The
    model gets a copy of `inputs` in the same memory format, and can change it in place. It gets the
    whole batch, as in training, if its outputs depend on more than one sample or it does not take
    a part of the batch.

    Args:
        model: any module; its training flags are restored.
        loss: mean loss of (outputs, targets), or (sum, denominator).
        inputs: [n, ...], floating point, as the model takes them.
        targets: as the loss takes them.
        step: ε in the units of `inputs`, broadcastable to them (for ε in pixel units, ε divided by
            the normalization's standard deviation).
        valid: smallest and largest value of an input, each broadcastable to `inputs`.
        count: only the first `count` inputs are changed; all by default.
    """
    n = len(inputs)
    count = n if count is None else count
    size = n if count == 1 or _uses_batch_statistics(model) else count
    try:
        gradient = _gradient(model, loss, inputs[:size], targets[:size] if size < n else targets)
    except Exception:
        if size == n:
            raise
        gradient = _gradient(model, loss, inputs, targets)
    x = inputs[:count]
    moved = torch.clamp(x + step * gradient[:count].sign(), min=valid[0], max=valid[1])
    return torch.cat([moved, inputs[count:]]) if count < n else moved


def _uses_batch_statistics(model: nn.Module) -> bool:
    return any(isinstance(m, _BatchNorm) and m.running_mean is None for m in model.modules())


def _gradient(model: nn.Module, loss: Loss, inputs: Tensor, targets: Any) -> Tensor:
    training = [module for module in model.modules() if module.training]
    # Without parameters that require grad, a plain `backward` is enough; `torch.autograd.grad`
    # does not work with reentrant activation checkpointing.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            x = inputs.detach().requires_grad_()
            # a clone, which the model may change in place
            value = loss(model(x.clone()), targets)
            (value[0] if isinstance(value, tuple) else value).backward()
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True
    return torch.zeros_like(inputs) if x.grad is None else x.grad
