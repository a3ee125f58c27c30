"""One optimizer step: this rank's microbatches, the sum over all ranks, the update.

step = engine.begin(Step(0, 4), ...)
for k in step.microbatches:
    with step.forward():
        loss = loss_fn(model(inputs[k]), targets[k])
    step.backward(loss, samples=len(targets[k]))
result = step.optimize()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from hpc_absa.progress import Step
from hpc_absa.records import GradientSquares
from hpc_absa.training.batchnorm import RunningStatistics
from hpc_absa.training.clock import Clock
from hpc_absa.training.reduction import MicrobatchNorms, Reduction


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
    """What a step sums beside the gradients: named views of one flat float32 tensor."""

    def __init__(self, statistics: int, device: torch.device) -> None:
        """`statistics` is the number of values of `RunningStatistics`."""
        self.flat = torch.zeros(statistics + 3, device=device)
        self._split(statistics)

    @classmethod
    def unpack(cls, flat: Tensor) -> StepSums:
        sums = cls.__new__(cls)
        sums.flat = flat
        sums._split(len(flat) - 3)
        return sums

    def _split(self, statistics: int) -> None:
        self.statistics = self.flat[:statistics]
        """Statistics of batch norm."""
        self.gradient_square, self.loss, self.samples = self.flat[statistics:].unbind()
        """Squared norms of microbatch gradients, losses times samples, samples; scalars."""


@dataclass(frozen=True)
class StepResult:
    """A finished step, summed over all ranks."""

    loss: float
    """Sum over the step's samples of the loss before the update."""
    samples: int
    flags: Flags
    squares: GradientSquares | None = None
    """If they were requested."""


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
    ) -> None:
        """Replaces the running statistics of batch norm, and registers hooks on parameters.

        Args:
            model: on its device, with its initial or restored weights.
            optimizer: of the model's parameters.
            reduction: how gradients are summed.
            seed: with the index of a microbatch, of the random generators in its forward pass.
            clock: charged with computing and communication.
            max_grad_norm: clip the gradient of a step to this norm; None for no clipping.
        """
        self.model, self.optimizer, self.reduction = model, optimizer, reduction
        self.seed, self.clock, self.max_grad_norm = seed, clock, max_grad_norm
        self.statistics = RunningStatistics(model)
        self.norms = MicrobatchNorms(model)
        self.device = next(model.parameters()).device

    def begin(
        self,
        step: Step,
        *,
        divisor: int,
        lr: float,
        steps_before: int,
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
            steps_before: steps taken before.
            flags: this rank's.
            measure_squares: measure the squared norms of gradients.
            upcoming: the step after it, if it is known.
        """
        ahead = self.lanes(upcoming.microbatches) if upcoming else []
        following = next((k for lane in ahead for k in lane), None)
        return TrainStep(self, step, divisor, lr, steps_before, flags, measure_squares, following)

    def lanes(self, microbatches: range) -> list[range]:
        """This rank's microbatches."""
        return self.reduction.lanes(microbatches)


class TrainStep:
    """A step in progress on one rank; made by `StepEngine.begin`."""

    def __init__(
        self,
        engine: StepEngine,
        step: Step,
        divisor: int,
        lr: float,
        steps_before: int,
        flags: Flags,
        measure_squares: bool,
        following: int | None,
    ) -> None:
        self._engine, self._step, self._divisor = engine, step, divisor
        self._lr, self._steps_before = lr, steps_before
        self._flags, self._measure_squares = flags, measure_squares
        self._lanes = engine.lanes(step.microbatches)
        self._mine = [k for lane in self._lanes for k in lane]
        self._after = dict(zip(self._mine, [*self._mine[1:], following], strict=False))
        self._total, self._lane = self._new_sums(), self._new_sums()
        self._last = False
        engine.norms.active = measure_squares
        engine.reduction.begin()

    @property
    def microbatches(self) -> Iterator[int]:
        """Indices of this rank's microbatches in the stream, in the order to compute them.

        Seeds torch's random generators for each, so that dropout does not depend on the rank.
        """
        for lane in self._lanes:
            self._lane = self._new_sums()
            for k in lane:
                torch.manual_seed(_microbatch_seed(self._engine.seed, k))
                self._last = k == self._mine[-1]
                yield k
            self._engine.reduction.end_lane(self._lane.flat)
            self._total.flat += self._lane.flat

    def following(self, k: int) -> int | None:
        """The microbatch that this rank computes after `k`, also in the next step, if known."""
        return self._after[k]

    def forward(self) -> AbstractContextManager[None]:
        """Encloses the one forward pass of a microbatch that trains: statistics are collected."""
        return self._engine.statistics.collecting(self._lane.statistics)

    def backward(self, loss: Tensor, samples: int) -> None:
        """Accumulate the gradient of a microbatch.

        Args:
            loss: scalar, the mean over the microbatch.
            samples: how many it is a mean over.
        """
        engine, lane = self._engine, self._lane
        last, square = self._last, lane.gradient_square
        with engine.reduction.backward(last=last), engine.norms.collecting(square):
            (loss / self._divisor).backward()
        lane.loss += loss.detach() * samples
        lane.samples += samples

    def optimize(self) -> StepResult:
        """Sum over all ranks, and update statistics and parameters."""
        engine, count = self._engine, len(self._step.microbatches)
        with engine.clock("comm"):
            flat, flags = engine.reduction.finish(self._total.flat, self._flags.pack(engine.device))
            sums = StepSums.unpack(flat)
            square, loss, samples = flat[-3:].tolist()
        with engine.clock("comp"):
            squares = self._squares(square, count) if self._measure_squares else None
            engine.statistics.update(sums.statistics, count, self._steps_before)
            if engine.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(engine.model.parameters(), engine.max_grad_norm)
            for group in engine.optimizer.param_groups:
                group["lr"] = self._lr
            engine.optimizer.step()
        return StepResult(loss, round(samples), Flags.unpack(flags), squares)

    def _new_sums(self) -> StepSums:
        return StepSums(self._engine.statistics.size, self._engine.device)

    def _squares(self, sum_of_squares: float, microbatches: int) -> GradientSquares:
        """From the reduced gradients, which are sums over microbatches divided by the divisor."""
        gradients = [p.grad for p in self._engine.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients)) * self._divisor / microbatches
        each = sum_of_squares * self._divisor**2 / microbatches
        return GradientSquares(microbatches, each, norm**2)


def _microbatch_seed(seed: int, index: int) -> int:
    """A seed for one microbatch, mixed (the finalizer of SplitMix64) as neighbours differ by 1."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + index + 1) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 30)) * 0x94D049BB133111EB & mask
    return (z ^ (z >> 31)) & 0x7FFF_FFFF
