"""Loss and metrics on the test set, every sample counted once over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hpc_absa.comm import Communicator
from hpc_absa.curvature.fast import Arguments
from hpc_absa.curvature.loss import Loss, mean_and_denominator
from hpc_absa.training.metrics import Metric


@dataclass(frozen=True)
class Evaluation:
    loss: float | None
    """Mean over the test samples, or the sum divided by the loss's own denominators; None without
    a test set."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """By name; the first is the one that is shown."""

    @property
    def accuracy(self) -> float | None:
        """Fraction of test samples that are predicted right, if that was measured."""
        return self.metrics.get("accuracy")


def evaluate(
    model: nn.Module,
    loss: Loss,
    metrics: Sequence[Metric],
    batches: Iterable[tuple[tuple[Any, Any], int]],
    comm: Communicator,
) -> Evaluation:
    """Evaluate in eval mode over this rank's `batches`, summed over all ranks (a collective).

    The losses and metrics of batches are summed exactly, so the result has the same bits however
    the batches are distributed over ranks. The training flags of modules are restored.

    Args:
        model: any module.
        loss: of outputs and targets.
        metrics: what else is measured.
        batches: inputs and targets, and the number of samples.
        comm: all ranks.
    """
    losses: list[tuple[float, float]] = []
    sums: list[list[Sequence[float]]] = [[] for _ in metrics]
    with evaluating(model):
        for (inputs, targets), samples in batches:
            outputs = call(model, inputs)
            mean, denominator = mean_and_denominator(loss, outputs, targets, samples)
            if denominator:
                losses.append((mean.item() * denominator, denominator))
            for metric, of_batches in zip(metrics, sums, strict=True):
                of_batches.append(metric.sums(outputs, targets))
    ranks = comm.allgather_object((losses, sums))
    total, denominator = _sum([pair for losses, _ in ranks for pair in losses], 2)
    values = {}
    for index, metric in enumerate(metrics):
        of_batches = [each for _, sums in ranks for each in sums[index]]
        value = metric.value(_sum(of_batches, len(of_batches[0]))) if of_batches else None
        if value is not None:
            values[metric.name] = value
    return Evaluation(total / denominator if denominator else None, values)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Within, the models are in evaluation mode, and nothing requires gradients."""
    training = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():  # tensors of inference mode could remain in a module's cache
            yield
    finally:
        for module, flag in training:
            module.training = flag


def call(model: nn.Module, inputs: Any) -> Any:
    """`model(inputs)`, or `model(*args, **kwargs)` for `Arguments`."""
    if isinstance(inputs, Arguments):
        return model(*inputs.args, **inputs.kwargs)
    return model(inputs)


def _sum(rows: Sequence[Sequence[float]], size: int) -> list[float]:
    """The sum of each column, exact unless a number is not finite."""
    columns = [[row[i] for row in rows] for i in range(size)]
    return [math.fsum(c) if all(map(math.isfinite, c)) else sum(c) for c in columns]
