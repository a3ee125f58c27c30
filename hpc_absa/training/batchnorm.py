"""Running statistics of batch norm that are equal on all ranks and at any world size.

PyTorch's own update puts each rank's microbatches into that rank's buffers, so that ranks drift
apart and the result depends on their number. Here a forward pass leaves the statistics of its
microbatch in a scratch buffer; those of a step are averaged over all its microbatches on all ranks,
and the average enters the running statistics once: `running ← (1 − m)·running + m·average`, with
the layer's momentum m.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class RunningStatistics:
    """The running means and variances of all batch-norm layers as one flat tensor.

    Replaces the buffers of the batch-norm layers of `model`, which must be on its device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None
        ]
        sizes = [layer.num_features for layer in self._layers for _ in range(2)]
        device = next(model.parameters()).device
        self._running = torch.zeros(sum(sizes), device=device)
        self._scratch = torch.zeros_like(self._running)
        self._num_batches = torch.zeros(len(self._layers), dtype=torch.int64, device=device)
        self._momentum = [layer.momentum for layer in self._layers]
        # One weight per element; NaN for layers that average over all steps (momentum=None).
        weights = [float("nan") if m is None else m for m in self._momentum for _ in range(2)]
        self._weight = torch.tensor(weights, device=device).repeat_interleave(
            torch.tensor(sizes, dtype=torch.int64, device=device)
        )
        self._running_views = _pairs(self._running.split(sizes))
        self._scratch_views = _pairs(self._scratch.split(sizes))
        for index, (layer, (mean, variance)) in enumerate(
            zip(self._layers, self._running_views, strict=True)
        ):
            mean.copy_(layer.running_mean)  # type: ignore[arg-type]
            variance.copy_(layer.running_var)  # type: ignore[arg-type]
            self._num_batches[index] = int(layer.num_batches_tracked or 0)
            layer._buffers["num_batches_tracked"] = self._num_batches[index]
        self._set_buffers(self._running_views)

    @property
    def size(self) -> int:
        """Values in all layers together."""
        return self._running.numel()

    @contextmanager
    def collecting(self, total: Tensor) -> Iterator[None]:
        """Within, one training forward pass adds its microbatch's statistics to `total`, [size]."""
        self._set_buffers(self._scratch_views)
        for layer in self._layers:
            layer.momentum = 1.0  # the buffer becomes the microbatch's statistic itself
        try:
            yield
            total += self._scratch
        finally:
            for layer, momentum in zip(self._layers, self._momentum, strict=True):
                layer.momentum = momentum
            self._set_buffers(self._running_views)

    def update(self, total: Tensor, microbatches: int, steps: int) -> None:
        """Update the running statistics once.

        Args:
            total: [size], the sum over all microbatches of a step, all ranks together.
            microbatches: how many they were.
            steps: steps taken before.
        """
        if not self._layers:
            return
        weight = torch.where(self._weight.isnan(), 1 / (steps + 1), self._weight)
        self._running.lerp_(total / microbatches, weight)
        self._num_batches.fill_(steps + 1)

    def _set_buffers(self, views: list[tuple[Tensor, Tensor]]) -> None:
        for layer, (mean, variance) in zip(self._layers, views, strict=True):
            layer._buffers["running_mean"] = mean
            layer._buffers["running_var"] = variance


def _pairs(parts: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(parts[::2], parts[1::2], strict=True))
