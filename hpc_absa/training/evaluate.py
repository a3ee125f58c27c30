"""Accuracy and loss on the test set, every sample counted once over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpc_absa.comm import Communicator
from hpc_absa.curvature.loss import mean_and_denominator
from hpc_absa.errors import UsageError

CROSS_ENTROPY = "train.loss = 'cross_entropy'"
"""The name of the built-in loss in messages."""


@dataclass(frozen=True)
class Evaluation:
    accuracy: float
    """Fraction of test samples whose predicted class is the target."""
    loss: float
    """Mean over the test samples, or the sum divided by the loss's own denominators."""


def predictions(outputs: Tensor, threshold: float) -> Tensor:
    """Classes int64 [b].

    Args:
        outputs: [b, classes], the largest output predicts; or one output for each sample, [b] or
            [b, 1], of two classes, of which the second one is predicted above the threshold.
        threshold: for one output.
    """
    if outputs.dim() == 1 or outputs.shape[1:] == (1,):
        return (outputs.reshape(-1) > threshold).long()
    return outputs.argmax(dim=1)


def threshold_of(loss: Callable[[Tensor, Tensor], Tensor], outputs: Tensor) -> float:
    """From which on one output predicts the second class.

    That is 0.5 where the loss is the same for both classes there and not at 0, as for
    probabilities; otherwise 0, as for logits.
    """

    def value(output: float, target: int) -> float:
        targets = torch.tensor([target], device=outputs.device)
        return float(loss(torch.full_like(outputs[:1], output), targets))

    try:
        at_half = math.isclose(value(0.5, 0), value(0.5, 1), rel_tol=1e-5)
        return 0.5 if at_half and not math.isclose(value(0, 0), value(0, 1), rel_tol=1e-5) else 0.0
    except Exception:
        return 0.0  # a loss that cannot be called with one sample


def require_scores(outputs: Any, samples: int, classes: int, model: str, loss: str) -> None:
    """Refuse outputs whose accuracy cannot be measured.

    Raises:
        UsageError: the shape does not fit the classes; the line names `model` and `loss`.
    """
    one = "; or [b] or [b, 1] with a loss for one output" if classes == 2 else ""
    expected = f"expected one score per class, [{samples}, {classes}]{one}"
    if not isinstance(outputs, Tensor):
        kind = type(outputs).__name__
        raise UsageError(f"{model}: in evaluation mode it returns a {kind}; {expected}")
    shape = list(outputs.shape)
    single = classes == 2 and loss != CROSS_ENTROPY and shape in ([samples], [samples, 1])
    if not single and (outputs.dim() != 2 or shape[0] != samples or shape[1] < max(2, classes)):
        raise UsageError(
            f"{model}: it returns outputs {shape} for {samples} samples of {classes} classes; "
            f"{expected}"
        )


def evaluate(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    comm: Communicator,
) -> Evaluation:
    """Evaluate in eval mode over this rank's `batches`, summed over all ranks (a collective).

    The losses of batches are summed exactly, so the result has the same bits however the batches
    are distributed over ranks. The training flags of modules are restored.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    correct = samples = 0
    losses: list[tuple[float, float]] = []
    threshold: float | None = None
    try:
        with torch.no_grad():  # tensors of inference mode could remain in a module's cache
            for inputs, targets in batches:
                outputs = model(inputs)
                if threshold is None:
                    threshold = threshold_of(loss, outputs) if outputs[0].numel() == 1 else 0.0
                correct += int((predictions(outputs, threshold) == targets).sum())
                samples += len(targets)
                mean, denominator = mean_and_denominator(loss, outputs, targets, len(targets))
                if denominator:
                    losses.append((mean.item() * denominator, denominator))
    finally:
        for module in training:
            module.training = True
    ranks = comm.allgather_object((correct, samples, losses))
    samples = max(1, sum(count for _, count, _ in ranks))
    each = [loss for _, _, losses in ranks for loss, _ in losses]
    total = math.fsum(each) if all(map(math.isfinite, each)) else sum(each)
    denominator = math.fsum(d for _, _, losses in ranks for _, d in losses) or 1.0
    return Evaluation(sum(right for right, _, _ in ranks) / samples, total / denominator)
