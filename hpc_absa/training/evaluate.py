"""Accuracy and loss on the test set, every sample counted once over all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpc_absa.comm import Communicator


@dataclass(frozen=True)
class Evaluation:
    accuracy: float
    """Fraction of test samples whose largest output is the target."""
    loss: float
    """Mean over the test samples."""


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
    losses = []
    try:
        with torch.inference_mode():
            for inputs, targets in batches:
                outputs = model(inputs)
                correct += int((outputs.argmax(dim=1) == targets).sum())
                samples += len(targets)
                losses.append(loss(outputs, targets).item() * len(targets))
    finally:
        for module in training:
            module.training = True
    ranks = comm.allgather_object((correct, samples, losses))
    samples = max(1, sum(count for _, count, _ in ranks))
    total = math.fsum(each for _, _, shares in ranks for each in shares)
    return Evaluation(sum(right for right, _, _ in ranks) / samples, total / samples)
