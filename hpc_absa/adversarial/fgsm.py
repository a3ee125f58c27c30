"""The fast gradient sign method (Goodfellow et al., arXiv:1412.6572, section 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Any, Any], Tensor]


def perturb(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Any,
    step: Tensor,
    valid: tuple[Tensor, Tensor],
) -> Tensor:
    """`x + step · sign(∇ₓ loss)`, clamped to the valid range; a new tensor shaped like `inputs`.

    The gradient is computed in evaluation mode, so that batch-norm statistics are neither used nor
    changed, and only with respect to the inputs, so that no parameter's `.grad` is changed.

    Args:
        model: any module; its training flags are restored.
        loss: mean loss of (outputs, targets).
        inputs: [n, ...], floating point, as the model takes them.
        targets: as the loss takes them.
        step: ε in the units of `inputs`, broadcastable to them (for ε in pixel units, ε divided by
            the normalization's standard deviation).
        valid: smallest and largest value of an input, each broadcastable to `inputs`.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.enable_grad():
            x = inputs.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(model(x), targets), x)
    finally:
        for module in training:
            module.training = True
    return torch.clamp(inputs + step * gradient.sign(), min=valid[0], max=valid[1])
