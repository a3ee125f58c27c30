"""One optimizer step from microbatches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import astuple, dataclass

import torch
from torch import Tensor, nn

from hpc_absa.adversarial import fgsm
from hpc_absa.data.batches import Microbatch
from hpc_absa.records import GradientSquares
from hpc_absa.training.clock import Clock
from hpc_absa.training.norms import MicrobatchNorms
from hpc_absa.training.reduction import FLAGS, Reduction
from hpc_absa.training.statistics import RunningStatistics

Loss = Callable[[Tensor, Tensor], Tensor]

RESERVED = 3 + FLAGS
"""The last values of a step's extras: squared norms, loss, samples and the flags."""


@dataclass(frozen=True)
class Flags:
    """What ranks tell each other with every step: true or false here, how many ranks in sum."""

    stop: int = 0
    """Has been asked to stop."""
    save: int = 0
    """Wants a periodic checkpoint (rank 0's clock alone)."""
    written: int = 0
    """Has its share of the save in flight on disk."""
    failed: int = 0
    """Could not write its share."""


@dataclass(frozen=True)
class StepResult:
    """What a step found, summed over all ranks."""

    loss: float
    """Sum over the step's samples of the loss before the update."""
    samples: int
    flags: Flags
    squares: GradientSquares | None = None
    """Where they were asked for."""


@dataclass(frozen=True)
class Adversary:
    """What the fast gradient sign method needs to know of the inputs."""

    step: Tensor
    """ε in the model's input space, `[1, C, 1, 1]`."""
    valid: tuple[Tensor, Tensor]
    """The images of 0 and 1 under the normalisation."""


@dataclass(frozen=True)
class Numerics:
    """How a step computes, beyond plain float32."""

    autocast: bool = False
    """Forward passes in bfloat16 where PyTorch holds that safe; weights, gradients, batch-norm
    statistics and the loss stay float32."""
    max_grad_norm: float | None = None
    """Largest norm of a step's gradient, of the sum over all ranks; a longer one is shortened."""


PLAIN = Numerics()


class Stepper:
    """Takes steps; knows nothing of schedules, epochs and checkpoints."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optimizer: torch.optim.Optimizer,
        statistics: RunningStatistics,
        reduction: Reduction,
        adversary: Adversary | None,
        clock: Clock,
        seed: int,
        numerics: Numerics = PLAIN,
    ) -> None:
        """`seed` is the job's: dropout masks are a function of it and the microbatch's place."""
        self._model = model
        self._loss = loss
        self._optimizer = optimizer
        self._statistics = statistics
        self._reduction = reduction
        self._norms = MicrobatchNorms(model)
        self._adversary = adversary
        self._clock = clock
        self._seed = seed
        self._numerics = numerics

    def lanes(self, microbatches: range) -> list[range]:
        """The microbatches that this rank will compute, in order."""
        return self._reduction.lanes(microbatches)

    def take(
        self,
        microbatches: range,
        feed: Iterator[Microbatch],
        *,
        divisor: int,
        lr: float,
        adversarial_fraction: float,
        steps_before: int,
        flags: Flags,
        wants_squares: bool = False,
    ) -> StepResult:
        """Step over `microbatches` of the stream; `feed` yields this rank's, in order.

        Gradients are summed over the microbatches and divided by `divisor`, the M of a full step;
        a step that was cut short so gives every sample the weight it has in a full one.
        """
        lanes = self.lanes(microbatches)
        mine = [k for lane in lanes for k in lane]
        self._norms.active = wants_squares
        totals = self._extras()
        self._reduction.begin()
        for lane in lanes:
            extra = self._extras()
            for k in lane:
                with self._clock("data"):
                    microbatch = next(feed)
                torch.manual_seed(_mixed(self._seed, k))
                last = k == mine[-1]
                self._pass(microbatch, divisor, adversarial_fraction, extra, last=last)
            self._reduction.end_lane(extra)
            totals += extra
        totals[-FLAGS:] = torch.tensor(astuple(flags), dtype=totals.dtype)
        with self._clock("comm"):
            totals = self._reduction.finish(totals)
            square, loss, samples, *told = totals[-RESERVED:].tolist()
        with self._clock("comp"):
            squares = self._squares(square, len(microbatches), divisor) if wants_squares else None
            self._statistics.update(totals[:-RESERVED], len(microbatches), steps_before)
            if self._numerics.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(
                    self._model.parameters(), self._numerics.max_grad_norm
                )
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        counts = Flags(*(round(count) for count in told))
        return StepResult(loss, round(samples), counts, squares)

    def _extras(self) -> Tensor:
        """What travels beside the gradients.

        Batch-norm statistics, then the squared norms of the microbatches' gradients, loss, samples,
        and the flags.
        """
        buffer = self._statistics.sum_buffer()
        return torch.cat([buffer, buffer.new_zeros(RESERVED)])

    def _squares(self, sum_of_squares: float, microbatches: int, divisor: int) -> GradientSquares:
        """Of the step just reduced, whose gradients are sums over microbatches over `divisor`."""
        parts = [p.grad for p in self._model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(parts)) * divisor / microbatches
        each = sum_of_squares * divisor**2 / microbatches
        return GradientSquares(microbatches, each, norm**2)

    def _pass(
        self, microbatch: Microbatch, divisor: int, fraction: float, extra: Tensor, *, last: bool
    ) -> None:
        """Forward and backward of one microbatch, with everything it adds to `extra`."""
        inputs, targets = microbatch.inputs, microbatch.targets
        count = int(fraction * len(targets) + 1e-9)  # 0.29 · 100 is 28.999…
        if count and self._adversary:
            with self._clock("adversarial"), self._autocast(inputs):
                moved = fgsm.perturb(
                    self._model,
                    self._loss,
                    inputs[:count],
                    targets[:count],
                    self._adversary.step,
                    self._adversary.valid,
                )
                inputs = torch.cat([moved, inputs[count:]])
        with self._clock("comp"):
            with self._statistics.collecting(extra[:-RESERVED]):
                with self._autocast(inputs):
                    outputs = self._model(inputs)
                # The loss is a sum over few numbers, which bfloat16 would spoil for nothing.
                outputs = outputs.float() if self._numerics.autocast else outputs
                loss = self._loss(outputs, targets)
            with self._reduction.backward(last=last), self._norms.collecting(extra[-RESERVED]):
                (loss / divisor).backward()
            extra[1 - RESERVED] += loss.detach() * len(targets)
            extra[2 - RESERVED] += len(targets)

    def _autocast(self, inputs: Tensor) -> AbstractContextManager[None]:
        on = self._numerics.autocast
        return torch.autocast(inputs.device.type, torch.bfloat16, enabled=on)


def _mixed(seed: int, index: int) -> int:
    """A seed for one microbatch, well mixed (splitmix64's finaliser) as neighbours differ by 1."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + index + 1) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ (z >> 30)) * 0x94D049BB133111EB & mask
    return (z ^ (z >> 31)) & 0x7FFF_FFFF
