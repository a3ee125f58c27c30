"""One optimizer step: this rank's microbatches, the sum over all ranks, the update.

step = engine.begin(Step(0, 4), ...)
for k in step.microbatches:
    with step.forward():
        loss = loss_fn(model(inputs[k]), targets[k])
    step.backward(loss, samples=len(targets[k]))
result = step.optimize()

A loss is a mean over the samples of its microbatch, or `(sum, denominator)`: a sum over tokens with
their number, a weighted sum with the sum of the weights. The gradient of a step is then that of
`Σ sums / Σ denominators` over the microbatches of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hpc_absa.data import order
from hpc_absa.errors import MisuseError
from hpc_absa.progress import Step
from hpc_absa.records import GradientSquares
from hpc_absa.training.buffers import Collected, ModelBuffers
from hpc_absa.training.clock import Clock
from hpc_absa.training.reduction import Reduction
from hpc_absa.training.sums import Flags, GradientNorms, StepSums

MicrobatchLoss = Tensor | tuple[Tensor, Tensor | float]
"""The mean over a microbatch, or `(sum, denominator)`."""


class StepResult(NamedTuple):
    """A finished step, summed over all ranks."""

    loss: float
    """Sum over the step of the loss before the update."""
    denominator: float
    """What `loss` is divided by: the samples, or the sum of the loss's own denominators."""
    samples: int
    flags: Flags
    squares: GradientSquares | None = None
    """If they were requested."""
    unclipped_norm: Tensor | None = None
    """Of the gradient before it was clipped, scalar; None without clipping."""


class StepEngine:
    """Takes steps with one model and optimizer; knows nothing of data, losses and schedules."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        reduction: Reduction,
        *,
        seed: int,
        clock: Clock,
        max_grad_norm: float | None = None,
        update: Callable[[float], None] | None = None,
    ) -> None:
        """Replaces running statistics, and registers hooks on normalizations and parameters.

        Args:
            model: on its device, with its initial or restored weights.
            optimizer: of the model's parameters.
            reduction: how gradients are summed.
            seed: with the index of a microbatch, of the random generators in its forward pass.
            clock: charged with communication.
            max_grad_norm: clip the gradient of a step to this norm; None for no clipping.
            update: updates the parameters from the gradients, with the schedule's learning rate; by
                default a step of the optimizer, whose groups get that rate times their ratio.
        """
        self.model, self.optimizer, self.reduction = model, optimizer, reduction
        self.seed, self.clock, self.max_grad_norm = seed, clock, max_grad_norm
        base = optimizer.defaults.get("lr")
        self.lr_ratios = [group["lr"] / base if base else 1.0 for group in optimizer.param_groups]
        """Of each parameter group: its learning rate is this times that of the schedule."""
        self.update = update or self._update
        self.scale: Callable[[Tensor], Tensor] = lambda loss: loss
        """Applied to the loss that is differentiated: float16 needs larger gradients."""
        self.unscale: Callable[[], None] = lambda: None
        """Undoes `scale` in the gradients, once they are summed."""
        self.buffers = ModelBuffers(model)
        self._norms: GradientNorms | None = None  # from the first step that wants them
        self._parameters = list(model.parameters())
        self._trained = [p for p in self._parameters if p.requires_grad]
        self._trained_ids = list(map(id, self._trained))
        self.device = self._parameters[0].device
        double = any(p.dtype == torch.float64 for p in self._parameters)
        dtype = torch.float64 if double else torch.float32
        self.no_buffers = torch.empty(0, dtype=dtype, device=self.device)
        """Of the type of all sums."""

    def begin(
        self,
        step: Step,
        *,
        divisor: int,
        lr: float,
        flags: Flags,
        measure_squares: bool = False,
    ) -> TrainStep:
        """Begin a step (all ranks together).

        Args:
            step: its microbatches.
            divisor: the M of a full step, by which the sum of gradients is divided, so that a step
                that was cut gives every sample the weight it has in a full one.
            lr: learning rate.
            flags: this rank's.
            measure_squares: measure the squared norms of gradients.
        """
        return TrainStep(self, step, divisor, lr, flags, measure_squares)

    def grad_norm(self, result: StepResult) -> float:
        """The norm of the last step's gradient, before clipping; on this rank alone."""
        if result.unclipped_norm is not None:
            return float(result.unclipped_norm)
        return float(torch.nn.utils.get_total_norm(self.gradients()))

    def measuring(self, lane: StepSums) -> AbstractContextManager[None]:
        """Encloses a backward pass whose gradient's squared norm is added to `lane`."""
        if self._norms is None:
            self._norms = GradientNorms(self.model)
        return self._norms.measuring(lane)

    def gradients(self) -> list[Tensor]:
        """Those that there are."""
        return [p.grad for p in self._trained if p.grad is not None]

    def lanes(self, microbatches: range) -> list[range]:
        """This rank's microbatches."""
        return self.reduction.lanes(microbatches)

    def require_same_parameters(self) -> None:
        """Refuse parameters that were frozen or unfrozen since the engine was made.

        Raises:
            MisuseError: there are such ones, whose gradients would not be summed over the ranks.
        """
        if [id(p) for p in self._parameters if p.requires_grad] != self._trained_ids:
            raise MisuseError(
                "requires_grad of a parameter was changed during a run: expected it before; leave "
                "the loop with break, and make another Run in another directory"
            )

    def require_known_parameters(self) -> None:
        """Refuse trainable parameters that the model did not have when the engine was made.

        Raises:
            MisuseError: there is one, whose gradient is neither cleared nor summed over ranks.
        """
        known = set(self._trained_ids)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in known:
                raise MisuseError(
                    f"the parameter {name} was added to the model, or unfrozen, during a run: "
                    "expected it before, since its gradient is not summed over the ranks"
                )

    def close(self) -> None:
        """Remove the hooks; the model and its parameters are plain ones again."""
        self.buffers.close()
        if self._norms:
            self._norms.close()
        self.reduction.close()

    def _update(self, lr: float) -> None:
        for group, ratio in zip(self.optimizer.param_groups, self.lr_ratios, strict=True):
            group["lr"] = lr * ratio
        self.optimizer.step()


_microbatch_seed = lru_cache(16)(order.microbatch_seed)
"""Also asked for again once a microbatch is read."""


class TrainStep:
    """A step in progress on one rank; made by `StepEngine.begin`."""

    def __init__(
        self,
        engine: StepEngine,
        step: Step,
        divisor: int,
        lr: float,
        flags: Flags,
        measure_squares: bool,
    ) -> None:
        self._engine, self._step, self._divisor = engine, step, divisor
        self.lr, self._flags, self._measure_squares = lr, flags, measure_squares
        self._lanes = engine.lanes(step.microbatches)
        self._last = next((lane[-1] for lane in reversed(self._lanes) if lane), None)
        self._k: int | None = None
        self._lane = self._new_sums()
        self._changed: list[Collected] = []  # one for each lane
        self._result: StepResult | None = None
        engine.reduction.begin()

    @property
    def microbatches(self) -> Iterator[int]:
        """Indices of this rank's microbatches in the stream, in the order to compute them.

        Seeds torch's random generators for each, so that dropout does not depend on the rank.
        """
        for lane in self._lanes:
            if self._changed:
                self._lane = self._new_sums()
            for k in lane:
                self.seed_generators(k)
                self._k = k
                yield k
            self._engine.reduction.end_lane(self._lane, empty=not lane)
            self._changed.append(self._lane.buffers)

    def seed_generators(self, k: int) -> int:
        """Seed torch's random generators for the forward pass of microbatch `k`; the seed."""
        seed = _microbatch_seed(self._engine.seed, k)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.5 ms
        if self._engine.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        return seed

    def forward(self) -> AbstractContextManager[None]:
        """Encloses the one forward pass of a microbatch that trains: its buffers are collected."""
        buffers = self._engine.buffers
        return buffers.collecting(self._lane.buffers) if buffers.size else nullcontext()

    def backward(self, loss: MicrobatchLoss, samples: int) -> None:
        """Accumulate the gradient of a microbatch.

        Args:
            loss: scalar, the mean over the microbatch; or `(sum, denominator)`, where the
                denominator depends on the targets alone and is 0 if nothing counts.
            samples: in the microbatch.
        """
        engine, lane = self._engine, self._lane
        if isinstance(loss, tuple):
            total, denominator = loss
            scaled = total / (samples * self._divisor)
            if not isinstance(denominator, Tensor) and not denominator:
                lane.samples += samples
                return  # no loss here, as where all targets are ignored
            lane.add(total, denominator, samples)
        else:
            scaled = loss / self._divisor if self._divisor > 1 else loss
            # In the type of the sums: 600 · 128 is infinite in float16.
            total = loss.detach().to(engine.no_buffers.dtype) * samples
            lane.add(total, samples, samples)
        with engine.reduction.backward(last=self._k == self._last):
            if not self._measure_squares:
                engine.scale(scaled).backward()
                return
            with engine.measuring(lane):
                engine.scale(scaled).backward()

    def optimize(self) -> StepResult:
        """Sum over all ranks, unless `reduce` was called, and update the parameters."""
        result = self.reduce()
        self._engine.update(self.lr)
        return result

    def reduce(self) -> StepResult:
        """Sum over all ranks, and update buffers; the gradients are then those of the step."""
        if self._result is not None:
            return self._result
        engine, count = self._engine, len(self._step.microbatches)
        with engine.clock("comm"):
            sums, flags = engine.reduction.finish(self._flags)
            square, loss, denominator, samples = sums.numbers()
            buffers = sums.buffers.flat
            changed = engine.buffers.changed(buffers)
            values = self._sum_values(changed) if changed else None
        if denominator not in (0.0, samples):  # gradients were divided by samples
            factor = samples / denominator
            torch._foreach_mul_(engine.gradients(), factor)
            square *= factor**2
        engine.unscale()
        squares = self._squares(square, count) if self._measure_squares else None
        engine.buffers.update(buffers, count, changed, values)
        norm = None
        if engine.max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(engine.model.parameters(), engine.max_grad_norm)
        self._result = StepResult(loss, denominator, samples, flags, squares, norm)
        return self._result

    def _new_sums(self) -> StepSums:
        engine = self._engine
        flat = engine.no_buffers
        if engine.buffers.size:
            flat = flat.new_zeros(engine.buffers.size)
        return StepSums(flat)

    def _sum_values(self, changed: list[int]) -> Tensor:
        """The sums over all ranks of the values of changed buffers."""
        engine = self._engine
        return engine.reduction.sum_lanes(
            [engine.buffers.values(lane, changed) for lane in self._changed]
        )

    def _squares(self, sum_of_squares: float, microbatches: int) -> GradientSquares:
        """From the reduced gradients, which are sums over microbatches divided by the divisor."""
        gradients = self._engine.gradients()
        norm = float(torch.nn.utils.get_total_norm(gradients)) * self._divisor / microbatches
        each = sum_of_squares * self._divisor**2 / microbatches
        return GradientSquares(microbatches, each, norm**2)
