"""One optimizer step of a user's script."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import numpy as np

from hpc_absa.errors import MisuseError
from hpc_absa.progress import Step as Microbatches
from hpc_absa.training import run as core
from hpc_absa.training.batches import ScriptLoader
from hpc_absa.training.step import MicrobatchLoss, StepResult

T = TypeVar("T")


class Step:
    """One optimizer step, in the body of `for step in run`."""

    result: StepResult | None = None

    def __init__(
        self,
        run: core.Run,
        loader: ScriptLoader,
        item: Microbatches,
        base_lr: float,
        unscale: Callable[[], None],
    ) -> None:
        self._run, self._loader, self._item, self._unscale = run, loader, item, unscale
        self._step = run.begin_step(item)
        self._forward: AbstractContextManager[None] | None = None
        self._exhausted = False
        progress = run.state.progress
        self.number: int = progress.position.step + 1
        """From 1."""
        self.epoch: float = run.epoch
        """Epochs visited before it."""
        self.global_batch: int = progress.schedule.global_batch
        """Samples of a full step, all ranks together."""
        self.factor: float = run.lr / base_lr
        """By which the optimizer's learning rates are multiplied."""
        self.adversarial_fraction: float = run.adversarial_fraction
        """Share of adversarial examples that ABSA asks for; making them is up to the script."""

    @property
    def microbatches(self) -> Iterator[list[int]]:
        """This rank's microbatches, as indices into the training set.

        Torch's, Python's and numpy's global random generators are seeded for each.
        """
        return self._each(lambda k: self._loader.samples(k)[0].tolist())

    @property
    def batches(self) -> Iterator[Any]:
        """This rank's microbatches, as batches of the run's data set on the model's device."""
        return self._each(lambda k: self._loader.batch(k, lambda count: self._coming(k, count)))

    def backward(self, loss: MicrobatchLoss) -> None:
        """Accumulate the gradient of a microbatch, once for each.

        Args:
            loss: the mean over the microbatch; or `(sum, denominator)`, such as a sum over tokens
                and their number: the step then divides the sum of all sums by that of all
                denominators. A `scaler` is applied here.
        """
        if self._forward is None:
            raise MisuseError("step.backward: expected one call for each microbatch of the step")
        self._forward.__exit__(None, None, None)
        self._forward = None
        self._step.backward(loss, samples=self._run.stream.microbatch)

    def reduce(self) -> None:
        """Sum the gradients over all ranks; the parameters' `.grad` are then those of the step.

        Only needed to do something with them before `optimize`, such as to clip them. With a
        `scaler` they are unscaled.
        """
        if not self._exhausted:
            raise MisuseError("step: expected a loop over all of its microbatches or batches")
        first = self.result is None
        if first:
            self._run.engine.require_same_parameters()
        self.result = self._step.reduce()
        if first:
            self._unscale()

    def optimize(self) -> None:
        """Sum the gradients over all ranks, and let the optimizer make its step."""
        self.reduce()
        assert self.result is not None
        self._step.optimize()
        self._run.end_step(self._item, self.result)

    @property
    def loss(self) -> float:
        """The mean loss of the step over all ranks, once it is reduced."""
        if self.result is None:
            raise MisuseError("step.loss: expected after step.reduce() or step.optimize()")
        return self.result.loss / (self.result.denominator or 1.0)

    def _each(self, read: Callable[[int], T]) -> Iterator[T]:
        for k in self._step.microbatches:
            with self._run.clock("data"):
                item = read(k)
                seed = self._step.seed_generators(k)
                random.seed(seed)
                np.random.seed(seed & 0xFFFFFFFF)
            self._forward = self._step.forward()
            self._forward.__enter__()
            yield item
            if self._forward is not None:
                raise MisuseError("step: a microbatch ended without step.backward(loss)")
        self._exhausted = True

    def _coming(self, k: int, count: int) -> list[int]:
        """This rank's next microbatches after `k`, at most `count`, with the present batch."""
        coming: list[int] = []
        stream, step = self._run.stream, self._item
        full = self.global_batch // stream.microbatch
        while len(coming) < count and step.stop <= stream.microbatches:
            for lane in self._run.engine.lanes(step.microbatches):
                coming += [other for other in lane if other > k]
            step = Microbatches(step.stop, step.stop + full)
        return coming[:count]
