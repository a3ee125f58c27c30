"""What the microbatches of a step add up beside gradients, and what ranks exchange with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hpc_absa.training.buffers import Collected

Number = Tensor | float

SCALARS = FLAGS = 4
"""Numbers of sums beside those of buffers, and of flags."""


class Flags(NamedTuple):
    """What ranks exchange with every step: 0 or 1 of one rank, the number of ranks in a sum."""

    stop: int = 0
    """A stop was requested on this rank."""
    save: int = 0
    """A periodic checkpoint is due (by rank 0's clock)."""
    written: int = 0
    """This rank's part of the pending save is on disk."""
    failed: int = 0
    """This rank could not write its part."""

    def pack(self, like: Tensor) -> Tensor:
        """As [4], with the type and device of `like`."""
        return like.new_tensor(self)

    @classmethod
    def unpack(cls, values: Tensor) -> Flags:
        return cls(*(round(value) for value in values.tolist()))


class StepSums:
    """Of the microbatches of a lane, or of a whole step."""

    def __init__(self, buffers: Tensor) -> None:
        """`buffers` is [S], zeros of the type of all sums, for `ModelBuffers`."""
        self.buffers = Collected(buffers)
        self.gradient_square: Number = 0.0
        """Of the gradients of microbatches, squared norms."""
        self.loss: Number = 0.0
        """As a sum."""
        self.denominator: Number = 0.0
        """What `loss` is divided by."""
        self.samples = 0.0

    def add(self, loss: Tensor, denominator: Number, samples: int) -> None:
        """Add a microbatch; an integer is exact, another denominator is added in the sums' type."""
        dtype = self.buffers.flat.dtype
        loss = loss.detach().to(dtype)
        if not isinstance(denominator, int):
            denominator = torch.as_tensor(denominator, dtype=dtype).detach()
        self.loss = loss + self.loss if isinstance(self.loss, Tensor) else loss
        self.denominator = self.denominator + denominator
        self.samples += samples

    def add_square(self, square: Tensor) -> None:
        """Add the squared norm of a microbatch's gradient."""
        square = square.to(self.buffers.flat.dtype)
        known = self.gradient_square
        self.gradient_square = square + known if isinstance(known, Tensor) else square

    def numbers(self) -> tuple[float, float, float, int]:
        """Squared norms, loss, denominator, samples."""
        square, loss, denominator = map(float, (self.gradient_square, self.loss, self.denominator))
        return square, loss, denominator, round(self.samples)

    def pack(self) -> Tensor:
        """As [S + 4]."""
        flat = self.buffers.flat
        scalars = (self.gradient_square, self.loss, self.denominator, self.samples)
        known = flat.new_tensor([0.0 if isinstance(n, Tensor) else n for n in scalars])
        for index, number in enumerate(scalars):
            if isinstance(number, Tensor):
                known[index] = number
        return torch.cat([flat, known])

    @classmethod
    def unpack(cls, flat: Tensor) -> StepSums:
        sums = cls(flat[:-SCALARS])
        square, loss, denominator, samples = flat[-SCALARS:].tolist()
        sums.gradient_square, sums.loss, sums.denominator = square, loss, denominator
        sums.samples = samples
        return sums


class GradientNorms:
    """The squared norm of what single backward passes compute.

    The unit is the microbatch and not the rank, so the sum over all of them does not depend on the
    number of ranks, up to the order of summation.
    """

    def __init__(self, model: nn.Module) -> None:
        self._gradients: dict[int, Tensor] | None = None
        parameters = [p for p in model.parameters() if p.requires_grad]
        self._handles = [p.register_hook(self._hook(i)) for i, p in enumerate(parameters)]

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    @contextmanager
    def measuring(self, sums: StepSums) -> Iterator[None]:
        """Within, one backward pass adds its gradient's squared norm to `sums`."""
        self._gradients = {}
        try:
            yield
            if self._gradients:
                norms = [torch.linalg.vector_norm(g) ** 2 for g in self._gradients.values()]
                sums.add_square(torch.stack(norms).sum())
        finally:
            self._gradients = None

    def _hook(self, index: int) -> Any:
        def on_gradient(gradient: Tensor) -> None:
            if self._gradients is None:
                return
            gradient = gradient.detach()
            if gradient.is_sparse:
                gradient = gradient.to_dense()
            if gradient.dtype != torch.float64:
                gradient = gradient.float()
            known = self._gradients.get(index)  # from a backward pass within this one
            self._gradients[index] = gradient if known is None else known + gradient

        return on_gradient
