"""The fast gradient sign method (Goodfellow et al., arXiv:1412.6572, section 4)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]


def perturb(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    step: Tensor,
    valid: tuple[Tensor, Tensor],
) -> Tensor:
    """`x + step · sign(∇ₓ loss)`, clamped to the valid range; a new tensor shaped like `inputs`.

    The gradient is taken in eval mode, so that batch-norm statistics neither enter nor change, and
    only with respect to the inputs, so that no parameter's `.grad` is touched.

    Args:
        model: any module; its training flags are as before on return.
        loss: mean loss of (outputs, targets).
        inputs: `[n, C, H, W]` in the model's input space.
        targets: `[n]`.
        step: ε in the model's input space, broadcastable to `inputs` (ε over the normalisation's
            standard deviation for an ε in pixel units).
        valid: smallest and largest value of an input, each broadcastable to `inputs`.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.enable_grad():
            moved = inputs.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(loss(model(moved), targets), moved)
    finally:
        for module in training:
            module.training = True
    return torch.clamp(inputs + step * gradient.sign(), min=valid[0], max=valid[1])
