"""One optimizer step of a user's script, and its optimizer."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hpc_absa.errors import MisuseError
from hpc_absa.progress import Step as Microbatches
from hpc_absa.training import run as core
from hpc_absa.training.batches import ScriptLoader
from hpc_absa.training.calls import Call, Calls
from hpc_absa.training.step import MicrobatchLoss, StepResult

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler

T = TypeVar("T")


class ScriptOptimizer:
    """Steps that the run takes; those of the script itself are refused until `close`."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, base_lr: float, scaler: GradScaler | None
    ) -> None:
        """`base_lr` is the first group's rate, for the schedule's base batch."""
        self._optimizer, self.base_lr, self._scaler = optimizer, base_lr, scaler
        self._permitted = self._unscaled = False
        self.scaled = scaler is not None and scaler.is_enabled()
        """Whether gradients are of a scaled loss until they are reduced."""
        self.close = optimizer.register_step_pre_hook(self._on_step).remove

    def update(self, lr: float) -> None:
        """Take a step; between the steps, the groups have rates of their own."""
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        factor = lr / self.base_lr
        with self:
            try:
                if factor != 1:
                    for group in groups:
                        group["lr"] = group["lr"] * factor
                if self._scaler is None or not self._unscaled:
                    self._optimizer.step()
                else:
                    self._unscaled = False
                    self._scaler.step(self._optimizer)
                    self._scaler.update()
            finally:
                for group, rate in zip(groups, rates, strict=True):
                    group["lr"] = rate

    def unscale(self, model: nn.Module) -> None:
        """Undo the scaler's factor in the summed gradients of `model`.

        The scaler itself does so for the parameters that the optimizer has.
        """
        if self._scaler is None:
            return
        own = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        gradients = {id(p): p.grad for p in model.parameters() if p.grad is not None}
        others = [gradient for key, gradient in gradients.items() if key not in own]
        self._unscaled = len(others) < len(gradients)
        if self._unscaled:  # the scaler refuses a step without a gradient
            self._scaler.unscale_(self._optimizer)
        if others:
            torch._foreach_mul_(others, 1 / self._scaler.get_scale())

    def __enter__(self) -> None:
        """Until `__exit__`, the optimizer may step."""
        self._permitted = True

    def __exit__(self, *error: object) -> None:
        self._permitted = False

    def _on_step(self, *arguments: Any) -> None:
        if not self._permitted:
            raise MisuseError(
                "optimizer.step() was called: expected step.optimize(), which calls it with the "
                "gradients of all ranks"
            )


class Step:
    """One optimizer step, in the body of `for step in run`."""

    result: StepResult | None = None

    def __init__(
        self,
        run: core.Run,
        loader: ScriptLoader,
        item: Microbatches,
        optimizer: ScriptOptimizer,
        calls: Calls,
    ) -> None:
        self._run, self._loader, self._item = run, loader, item
        self._optimizer, self._calls = optimizer, calls
        if optimizer.scaled and run.rule.wants_gradients(run.state.progress.schedule):
            raise MisuseError(
                "absa.Run: scaler: expected none with a schedule that measures gradients"
            )
        self._step = run.begin_step(item)
        self.computing = ExitStack()
        """Until `optimize`; from then on, no progress is expected before the next step."""
        self.computing.enter_context(run.clock("comp"))
        self._forward: AbstractContextManager[None] | None = None
        self._begun = self._exhausted = self.optimized = False
        progress = run.state.progress
        self.number: int = progress.position.step + 1
        """From 1."""
        self.epoch: float = run.epoch
        """Epochs visited before it."""
        self.global_batch: int = progress.schedule.global_batch
        """Samples of a full step, all ranks together."""
        self.factor: float = self._step.lr / optimizer.base_lr
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
        value = loss[0] if isinstance(loss, tuple) and len(loss) == 2 else loss
        if not isinstance(value, Tensor) or value.numel() != 1:
            kind = f"shape {list(value.shape)}" if isinstance(value, Tensor) else repr(value)[:80]
            raise MisuseError(
                f"step.backward: got {kind}: expected the mean loss of the microbatch as a scalar "
                "tensor, or (sum, denominator)"
            )
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
        if self.result is None:
            self._run.engine.require_same_parameters()
            self._calls.enter(Call.REDUCE)
            self.result = self._step.reduce()

    def optimize(self) -> None:
        """Sum the gradients over all ranks, and let the optimizer make its step."""
        if self.optimized:
            raise MisuseError("step.optimize: expected one call for each step")
        self.reduce()
        assert self.result is not None
        self.optimized = True
        self._step.optimize()
        self._run.end_step(self._item, self.result)
        self._calls.step = self.number
        self.computing.close()
        self.computing.enter_context(self._run.stop.saving())  # as the body of the loop goes on

    @property
    def loss(self) -> float:
        """The mean loss of the step over all ranks, once it is reduced."""
        if self.result is None:
            raise MisuseError("step.loss: expected after step.reduce() or step.optimize()")
        return self.result.loss / (self.result.denominator or 1.0)

    def _each(self, read: Callable[[int], T]) -> Iterator[T]:
        if self._begun:
            raise MisuseError("step: expected one loop over its microbatches or batches")
        self._begun = True
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
