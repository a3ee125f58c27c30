"""Accuracy and loss on the test set, every image counted once over all ranks."""

from __future__ import annotations

import math
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

    The batches' losses are added up exactly, so that the result has the same bits however they
    were dealt to ranks. Training flags are as before on return.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    correct = images = 0
    losses = []
    try:
        with torch.inference_mode():
            for inputs, targets in batches:
                outputs = model(inputs)
                correct += int((outputs.argmax(dim=1) == targets).sum())
                images += len(targets)
                losses.append(loss(outputs, targets).item() * len(targets))
    finally:
        for module in training:
            module.training = True
    everyone = comm.allgather_object((correct, images, losses))
    images = max(1, sum(count for _, count, _ in everyone))
    total = math.fsum(each for _, _, shares in everyone for each in shares)
    return Evaluation(sum(right for right, _, _ in everyone) / images, total / images)
