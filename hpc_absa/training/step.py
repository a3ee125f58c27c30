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
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from hpc_absa.data import order
from hpc_absa.errors import MisuseError
from hpc_absa.progress import Step
from hpc_absa.records import GradientSquares
from hpc_absa.training.buffers import Collected, ModelBuffers
from hpc_absa.training.clock import Clock
from hpc_absa.training.reduction import GradientHooks, Reduction

MicrobatchLoss = Tensor | tuple[Tensor, Tensor | float]
"""The mean over a microbatch, or `(sum, denominator)`."""


@dataclass(frozen=True)
class Flags:
    """What ranks exchange with every step: 0 or 1 of one rank, the number of ranks in a sum."""

    stop: int = 0
    """A stop was requested on this rank."""
    save: int = 0
    """A periodic checkpoint is due (by rank 0's clock)."""
    written: int = 0
    """This rank's part of the pending save is on disk."""
    failed: int = 0
    """This rank could not write its part."""

    def pack(self, device: torch.device) -> Tensor:
        """As float32 [4]."""
        return torch.tensor(astuple(self), dtype=torch.float32, device=device)

    @classmethod
    def unpack(cls, values: Tensor) -> Flags:
        return cls(*(round(value) for value in values.tolist()))


class StepSums:
    """What a step sums beside the gradients: named views of one flat tensor."""

    def __init__(self, flat: Tensor, buffers: int) -> None:
        """`flat` is [S + P + 4], with the S values of `buffers` and P parameters."""
        self.flat = flat
        self.buffers = Collected(flat[:buffers])
        self.used = flat[buffers:-4]
        """[P], microbatches with a gradient of each parameter."""
        self.gradient_square, self.loss, self.denominator, self.samples = flat[-4:].unbind()
        """Squared norms of microbatch gradients; the loss as a sum, and what it is divided by;
        samples; scalars."""

    def numbers(self) -> tuple[list[float], float, float, float, float]:
        """All but `buffers`, in one transfer from the device."""
        *used, square, loss, denominator, samples = self.flat[-len(self.used) - 4 :].tolist()
        return used, square, loss, denominator, samples


@dataclass(frozen=True)
class StepResult:
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
            clock: charged with computing and communication.
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
        self.buffers = ModelBuffers(model)
        self.hooks = GradientHooks(model)
        self.device = next(model.parameters()).device
        double = any(p.dtype == torch.float64 for p in model.parameters())
        self.dtype = torch.float64 if double else torch.float32
        """Of sums."""

    def begin(
        self,
        step: Step,
        *,
        divisor: int,
        lr: float,
        flags: Flags,
        measure_squares: bool = False,
        upcoming: Step | None = None,
    ) -> TrainStep:
        """Begin a step (all ranks together).

        Args:
            step: its microbatches.
            divisor: the M of a full step, by which the sum of gradients is divided, so that a step
                that was cut gives every sample the weight it has in a full one.
            lr: learning rate.
            flags: this rank's.
            measure_squares: measure the squared norms of gradients.
            upcoming: the step after it, if it is known.
        """
        ahead = self.lanes(upcoming.microbatches) if upcoming else []
        following = next((k for lane in ahead for k in lane), None)
        return TrainStep(self, step, divisor, lr, flags, measure_squares, following)

    def grad_norm(self, result: StepResult) -> float:
        """The norm of the last step's gradient, before clipping; on this rank alone."""
        if result.unclipped_norm is not None:
            return float(result.unclipped_norm)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def lanes(self, microbatches: range) -> list[range]:
        """This rank's microbatches."""
        return self.reduction.lanes(microbatches)

    def require_same_parameters(self) -> None:
        """Refuse parameters that were frozen or unfrozen since the engine was made.

        Raises:
            MisuseError: there are such ones, whose gradients would not be summed over the ranks.
        """
        if sum(p.requires_grad for p in self.model.parameters()) != len(self.hooks.parameters):
            raise MisuseError(
                "requires_grad of a parameter was changed during a run: expected it before; leave "
                "the loop with break, and make another Run in another directory"
            )

    def close(self) -> None:
        """Remove the hooks; the model and its parameters are plain ones again."""
        self.buffers.close()
        self.hooks.close()
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
        following: int | None,
    ) -> None:
        self._engine, self._step, self._divisor = engine, step, divisor
        self._lr, self._flags, self._measure_squares = lr, flags, measure_squares
        self._lanes = engine.lanes(step.microbatches)
        self._mine = [k for lane in self._lanes for k in lane]
        self._after = dict(zip(self._mine, [*self._mine[1:], following], strict=False))
        self._total, self._lane = self._new_sums(), self._new_sums()
        self._changed: list[Collected] = []  # one for each lane
        self._last = False
        self._result: StepResult | None = None
        engine.reduction.begin()

    @property
    def microbatches(self) -> Iterator[int]:
        """Indices of this rank's microbatches in the stream, in the order to compute them.

        Seeds torch's random generators for each, so that dropout does not depend on the rank.
        """
        for lane in self._lanes:
            self._lane = self._new_sums()
            hooks = self._engine.hooks
            hooks.used = [0.0] * len(hooks.parameters)
            for k in lane:
                self.seed_generators(k)
                self._last = k == self._mine[-1]
                yield k
            self._lane.used += torch.tensor(hooks.used, device=self._engine.device)
            self._engine.reduction.end_lane(self._lane.flat if lane else None)
            self._total.flat += self._lane.flat
            self._changed.append(self._lane.buffers)

    def seed_generators(self, k: int) -> int:
        """Seed torch's random generators for the forward pass of microbatch `k`; the seed."""
        seed = _microbatch_seed(self._engine.seed, k)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 0.5 ms
        if self._engine.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        return seed

    def following(self, k: int) -> int | None:
        """The microbatch that this rank computes after `k`, also in the next step, if known."""
        return self._after[k]

    def forward(self) -> AbstractContextManager[None]:
        """Encloses the one forward pass of a microbatch that trains: its buffers are collected."""
        return self._engine.buffers.collecting(self._lane.buffers)

    def backward(self, loss: MicrobatchLoss, samples: int) -> None:
        """Accumulate the gradient of a microbatch.

        Args:
            loss: scalar, the mean over the microbatch; or `(sum, denominator)`, where the
                denominator depends on the targets alone and is 0 if nothing counts.
            samples: in the microbatch.
        """
        engine, lane = self._engine, self._lane
        square = lane.gradient_square if self._measure_squares else None
        if isinstance(loss, tuple):
            total, denominator = loss
            scaled = total / (samples * self._divisor)
        else:
            total, denominator = loss.detach() * samples, float(samples)
            scaled = loss / self._divisor
        lane.samples += samples
        if isinstance(denominator, float) and not denominator:
            return  # no loss here, as where all targets are ignored
        with engine.reduction.backward(last=self._last), engine.hooks.measuring(square):
            engine.scale(scaled).backward()
        lane.loss += total.detach()
        lane.denominator += denominator

    def optimize(self) -> StepResult:
        """Sum over all ranks, unless `reduce` was called, and update the parameters."""
        result = self.reduce()
        with self._engine.clock("comp"):
            self._engine.update(self._lr)
        return result

    def reduce(self) -> StepResult:
        """Sum over all ranks, and update buffers; the gradients are then those of the step."""
        if self._result is not None:
            return self._result
        engine, count = self._engine, len(self._step.microbatches)
        with engine.clock("comm"):
            flat, flags = engine.reduction.finish(self._total.flat, self._flags.pack(engine.device))
            sums = StepSums(flat, engine.buffers.size)
            used, square, loss, denominator, samples = sums.numbers()
            buffers = flat[: engine.buffers.size]
            changed = engine.buffers.changed(buffers)
            values = self._sum_values(changed) if changed else None
        with engine.clock("comp"):
            for parameter, microbatches in zip(engine.hooks.parameters, used, strict=True):
                if not microbatches:  # as in PyTorch, neither momentum nor weight decay applies
                    parameter.grad = None
            if denominator not in (0.0, samples):  # gradients were divided by samples
                factor = samples / denominator
                gradients = [p.grad for p in engine.hooks.parameters if p.grad is not None]
                torch._foreach_mul_(gradients, factor)
                square *= factor**2
            squares = self._squares(square, count) if self._measure_squares else None
            engine.buffers.update(buffers, count, changed, values)
            norm = None
            if engine.max_grad_norm is not None:
                norm = torch.nn.utils.clip_grad_norm_(
                    engine.model.parameters(), engine.max_grad_norm
                )
        self._result = StepResult(
            loss, denominator, round(samples), Flags.unpack(flags), squares, norm
        )
        return self._result

    def _new_sums(self) -> StepSums:
        engine = self._engine
        size = engine.buffers.size + len(engine.hooks.parameters) + 4
        flat = torch.zeros(size, dtype=engine.dtype, device=engine.device)
        return StepSums(flat, engine.buffers.size)

    def _sum_values(self, changed: list[int]) -> Tensor:
        """The sums over all ranks of the values of changed buffers."""
        engine = self._engine
        return engine.reduction.sum_lanes(
            [engine.buffers.values(lane, changed) for lane in self._changed]
        )

    def _squares(self, sum_of_squares: float, microbatches: int) -> GradientSquares:
        """From the reduced gradients, which are sums over microbatches divided by the divisor."""
        gradients = [p.grad for p in self._engine.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) * self._divisor / microbatches
        each = sum_of_squares * self._divisor**2 / microbatches
        return GradientSquares(microbatches, each, norm**2)
