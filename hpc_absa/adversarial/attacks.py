"""Attacks on classifiers: projected gradient descent and the trust-region attack.

All are functions of a model, inputs and targets; `fgsm.perturb` is the single step. They run the
model in evaluation mode, change no parameter, buffer or `.grad`, and attack only samples that the
model classifies correctly. A sample's result depends on the samples of its batch in the last bits
at most.

Shapes:
    n        samples
    c        classes
    inputs   [n, ...], floating point, as the model takes them
    targets  [n], int64
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpc_absa.adversarial.fgsm import frozen
from hpc_absa.errors import UsageError

Norm = Literal["l2", "linf"]
Loss = Callable[[Any, Any], Any]

OVERSHOOT, EXTRA = 1.02, 1e-4
"""A trust-region step is 1.02 (r + 1e-4) long, so that it crosses a linear boundary."""

RADII: dict[str, tuple[float, float]] = {"l2": (5e-4, 0.05), "linf": (1e-4, 0.01)}
"""Smallest and largest trust radius of the adaptive attack, by norm (the authors' code)."""


TINY = 1e-30
"""In place of a length of zero."""


@dataclass(frozen=True)
class Attacked:
    """The result of an attack on one batch."""

    inputs: Tensor
    """[n, ...], those not attacked as they were."""
    updates: Tensor
    """int64 [n], how often each sample was changed."""


def require_attackable(inputs: Any, outputs: Any = None) -> None:
    """Refuse inputs that cannot be changed slightly, and outputs that are no scores.

    Raises:
        UsageError: one line.
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        kind = str(inputs.dtype) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise UsageError(
            f"attack: inputs are {kind} (such as tokens), expected images or other floating-point "
            "values, which can be changed slightly"
        )
    if outputs is None:
        return
    shape = list(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or outputs.shape[1] < 2:
        raise UsageError(
            f"attack: the model returns {shape}, expected one score per class, [n, classes]"
        )


def correct(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Which samples are classified correctly, bool [n]; in the mode that the model is in."""
    with torch.no_grad():
        outputs = model(inputs.clone())
    require_attackable(inputs, outputs)
    if targets.is_floating_point() or targets.dim() != 1:
        raise UsageError(
            f"attack: targets are {targets.dtype} {list(targets.shape)}, expected the class of "
            "each sample"
        )
    return outputs.argmax(1) == targets


def pgd(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    epsilon: Tensor | float,
    valid: tuple[Tensor, Tensor],
    *,
    norm: Norm = "linf",
    steps: int = 10,
    step: float = 0.25,
) -> Attacked:
    """Projected gradient descent (Madry et al., arXiv:1706.06083, section 2.1).

    `x ← Π(x + step · ε · direction)`, direction the gradient's sign (`linf`) or the gradient of
    length 1 (`l2`), Π the projection onto the ball of radius ε around the input and onto `valid`.
    Lengths are in units of ε: with ε a tensor that scales each channel, the `l2` ball is one in
    pixels. Samples that are fooled are not changed any further.

    Args:
        model: any classifier; its training flags are restored.
        loss: mean loss of (outputs, targets), or (sum, denominator).
        inputs: [n, ...].
        targets: [n].
        epsilon: positive, broadcastable to the inputs, in their units.
        valid: smallest and largest value of an input.
        norm: of the ball.
        steps: at most.
        step: length of a step, as a fraction of ε.
    """
    require_attackable(inputs)
    x = inputs.clone()
    updates = torch.zeros(len(inputs), dtype=torch.int64)
    with frozen(model):
        attacked = _selected(correct(model, inputs, targets))
        for _ in range(steps):
            if not len(attacked):
                break
            outputs, gradient = _loss_gradient(model, loss, x[attacked], targets[attacked])
            still = outputs.argmax(1) == targets[attacked]
            attacked, gradient = attacked[still], gradient[still]
            origin = inputs[attacked]
            # in units of ε: the gradient with respect to δ / ε is ε times the gradient
            direction = _direction(gradient * epsilon, norm)
            shift = (x[attacked] - origin) / epsilon + step * direction
            x[attacked] = (origin + epsilon * _projected(shift, norm)).clamp(*valid)
            updates[attacked.cpu()] += 1
    return Attacked(x, updates)


def trust_region(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    valid: tuple[Tensor, Tensor],
    *,
    norm: Norm = "l2",
    hard: bool = False,
    adaptive: bool = True,
    radius: float = 1e-3,
    steps: int = 400,
    classes: int = 9,
    reference: bool = False,
) -> Attacked:
    """The trust-region attack (Yao et al., arXiv:1812.06371, algorithm 1, first order).

    Each sample gets one target class (`target_classes`). A step lowers the gap g = z_y − z_t
    between the logits of class and target by its linear model: with q dual to the norm,
    `r = min(g / ‖∇g‖_q, radius)` and `x ← x − 1.02 (r + 1e-4) · direction`, clamped to `valid`,
    for the samples that are still classified correctly. The adaptive radius depends on
    `ρ = (g − g_new) / (r ‖∇g‖_q)`, the actual by the predicted fall: above 0.9 it is r · 1.2, below
    0.5 r / 1.2, else r, within `RADII`.

    Args:
        model: returns logits [n, c]; its training flags are restored.
        inputs: [n, ...].
        targets: [n].
        valid: smallest and largest value of an input.
        norm: of a step.
        hard: the class that is hardest to reach, instead of the easiest.
        adaptive: adapt the radius of each sample.
        radius: at first, in units of the inputs.
        steps: at most.
        classes: candidates for the target class: those of the next largest logits.
        reference: ρ of the authors' code, `(g − (z_y,new − z_t)) / r`, which is no ratio.
    """
    require_attackable(inputs)
    x = inputs.clone()
    updates = torch.zeros(len(inputs), dtype=torch.int64)
    radii = torch.full((len(inputs),), radius, device=inputs.device, dtype=inputs.dtype)
    low, high = RADII[norm]
    with frozen(model):
        chosen = target_classes(model, inputs, norm=norm, hard=hard, classes=classes)
        attacked = torch.arange(len(inputs), device=inputs.device)
        for _ in range(steps):
            y, t = targets[attacked], chosen[attacked]
            logits, gap, gradient = _gap(model, x[attacked], y, t)
            still = logits.argmax(1) == y
            attacked, y, t, gap = attacked[still], y[still], t[still], gap[still]
            logits, gradient = logits[still], gradient[still]
            if not len(attacked):
                break
            slope = _length(gradient, "l2" if norm == "l2" else "l1").clamp_min(TINY)
            r = torch.minimum(gap / slope, radii[attacked])
            move = _broadcast(OVERSHOOT * (r + EXTRA), x) * _direction(gradient, norm)
            moved = (x[attacked] - move).clamp(*valid)
            updates[attacked.cpu()] += 1
            x[attacked] = moved
            if adaptive:
                with torch.no_grad():
                    new = model(moved.clone())
                rows = torch.arange(len(y), device=y.device)
                left = (logits if reference else new)[rows, t]
                ratio = (gap - (new[rows, y] - left)) / (r if reference else r * slope)
                factor = torch.where(ratio > 0.9, 1.2, torch.where(ratio < 0.5, 1 / 1.2, 1.0))
                radii[attacked] = (r * factor).clamp(low, high)
    return Attacked(x, updates)


def target_classes(
    model: nn.Module, inputs: Tensor, *, norm: Norm, hard: bool, classes: int
) -> Tensor:
    """int64 [n]: of the `classes` next largest logits the easiest (or hardest) class to reach.

    That is the smallest (largest) `(z_y − z_i) / ‖∇(z_y − z_i)‖_q`, the distance to the boundary in
    the linear model, with z_y the largest logit.
    """
    x = inputs.detach().clone().requires_grad_()
    logits = model(x.clone())
    require_attackable(inputs, logits)
    order = logits.detach().argsort(1, descending=True)[:, : classes + 1]
    rows = torch.arange(len(inputs), device=inputs.device)
    dual = "l2" if norm == "l2" else "l1"
    distances = []
    for i in range(1, order.shape[1]):
        gap = logits[rows, order[:, 0]] - logits[rows, order[:, i]]
        gradient = _gradient(gap.sum(), x, retain_graph=True)
        distances.append(gap.detach() / _length(gradient, dual).clamp_min(TINY))
    table = torch.stack(distances, 1)
    return order[rows, 1 + (table.argmax(1) if hard else table.argmin(1))]


# Parts


def _selected(mask: Tensor) -> Tensor:
    return mask.nonzero().view(-1)


def _loss_gradient(
    model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [n, c], and the gradient of the loss by the inputs."""
    x = inputs.detach().requires_grad_()
    outputs = model(x.clone())
    value = loss(outputs, targets)
    return outputs.detach(), _gradient(value[0] if isinstance(value, tuple) else value, x)


def _gap(model: nn.Module, inputs: Tensor, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [n, c], `z_y − z_t` [n], and its gradient by the inputs."""
    x = inputs.detach().requires_grad_()
    logits = model(x.clone())
    rows = torch.arange(len(y), device=y.device)
    gap = logits[rows, y] - logits[rows, t]
    return logits.detach(), gap.detach(), _gradient(gap.sum(), x)


def _gradient(value: Tensor, x: Tensor, retain_graph: bool = False) -> Tensor:
    """By the leaf x alone: parameters are frozen."""
    # `torch.autograd.grad` does not work with reentrant activation checkpointing
    value.backward(retain_graph=retain_graph)
    gradient, x.grad = x.grad, None
    assert gradient is not None
    return gradient


def _length(tensor: Tensor, norm: str) -> Tensor:
    """[n], of each sample, in the norm l1, l2 or linf."""
    order = {"l1": 1.0, "l2": 2.0, "linf": float("inf")}[norm]
    return torch.linalg.vector_norm(tensor.flatten(1), order, dim=1)


def _broadcast(values: Tensor, like: Tensor) -> Tensor:
    """[n] as [n, 1, ...]."""
    return values.view(-1, *(1,) * (like.dim() - 1))


def _direction(gradient: Tensor, norm: Norm) -> Tensor:
    """Steepest ascent of length 1 in the norm."""
    if norm == "linf":
        return gradient.sign()
    return gradient / _broadcast(_length(gradient, "l2").clamp_min(TINY), gradient)


def _projected(shift: Tensor, norm: Norm) -> Tensor:
    """Onto the ball of radius 1."""
    if norm == "linf":
        return shift.clamp(-1, 1)
    return shift / _broadcast(_length(shift, "l2").clamp_min(1), shift)


def relative_size(moved: Tensor, inputs: Tensor, norm: Norm) -> Tensor:
    """`‖δ‖ / ‖x‖` of each sample, [n], in the units of the model's inputs."""
    return _length(moved - inputs, norm) / _length(inputs, norm).clamp_min(TINY)
