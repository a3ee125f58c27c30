"""The update that an optimizer would make, without making it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map


def update_direction(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    gradient: Tensor,
    max_grad_norm: float | None = None,
) -> Tensor:
    """The Δ [P] of the optimizer's next step `θ − η·Δ` with this gradient [P].

    η is the rate of the first group; the others keep their ratio to it. The gradient is clipped to
    `max_grad_norm`, as in a step.

    Parameters, gradients and the optimizer's state are unchanged afterwards. P counts the trainable
    parameters in `model.parameters()` order.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if max_grad_norm is not None:  # as clip_grad_norm_
        norm = torch.linalg.vector_norm(gradient)
        gradient = gradient * (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
    pieces = gradient.split([p.numel() for p in parameters])
    gradients = [p.grad for p in parameters]
    weights = [p.detach().clone() for p in parameters]
    # The same tensors in new containers: a state may have lists and dictionaries in it.
    state = {p: tree_map(lambda leaf: leaf, dict(own)) for p, own in optimizer.state.items()}
    tensors = [leaf for leaf in tree_leaves(list(state.values())) if isinstance(leaf, Tensor)]
    values = [tensor.clone() for tensor in tensors]
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        for p, piece in zip(parameters, pieces, strict=True):
            p.grad = piece.view_as(p).to(p)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = float(rate / rates[0]) if rates[0] else 1.0
        optimizer.step()
        moved = zip(weights, parameters, strict=True)
        return torch.cat([(old - new.detach()).reshape(-1) for old, new in moved]).to(gradient)
    finally:
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        with torch.no_grad():
            for p, weight, before in zip(parameters, weights, gradients, strict=True):
                p.copy_(weight)
                p.grad = before
            for other in [p for p in optimizer.state if p not in state]:
                del optimizer.state[other]
            for other, own in state.items():
                optimizer.state[other] = own
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
