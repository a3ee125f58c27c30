"""Accuracy and loss on the test set, every image counted once over all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpc_absa.comm import Communicator


@dataclass(frozen=True)
class Evaluation:
    """What the whole test set says."""

    accuracy: float
    """Fraction of test images whose largest output is the target."""
    loss: float
    """Mean loss."""


def evaluate(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    comm: Communicator,
) -> Evaluation:
    """Evaluate in eval mode over this rank's `batches`; sums go over all ranks (a collective).

    Training flags are as before on return.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)  # correct, loss, images
    try:
        with torch.inference_mode():
            for inputs, targets in batches:
                outputs = model(inputs)
                correct = (outputs.argmax(dim=1) == targets).sum().item()
                mean = loss(outputs, targets).item()
                totals += torch.tensor([correct, mean * len(targets), len(targets)])
    finally:
        for module in training:
            module.training = True
    correct, loss_sum, images = comm.sum_(totals).tolist()
    return Evaluation(correct / max(images, 1), loss_sum / max(images, 1))
