"""Squared norms of the microbatches' own gradients, before they are added up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MicrobatchNorms:
    """Hears each gradient of a backward pass before it is added to those of earlier passes.

    The microbatch is the unit, not the rank: so the sum over all of them is the same at any number
    of ranks, up to the order of summation.
    """

    def __init__(self, model: nn.Module) -> None:
        """Hooks every parameter that requires a gradient; inactive hooks cost next to nothing."""
        self.active = False
        """Whether the passes to come are to be measured."""
        self._squares: list[Tensor] | None = None
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(self._hear)

    @contextmanager
    def collecting(self, total: Tensor) -> Iterator[None]:
        """Within, one backward pass adds the square of its gradient's norm to `total`, a scalar."""
        if not self.active:
            yield
            return
        self._squares = []
        try:
            yield
            if self._squares:
                total += torch.stack(self._squares).sum()
        finally:
            self._squares = None

    def _hear(self, gradient: Tensor) -> None:
        # Other passes come by too: those of Hessian-vector products.
        if self._squares is not None:
            self._squares.append(torch.linalg.vector_norm(gradient.detach().float()) ** 2)
