"""What every schedule is: a start, a decision, and a learning rate between decisions."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hpc_absa.records import Decision, GradientSquares, Observation, ScheduleState

EXPONENTS: Mapping[str, float] = {"linear": 1.0, "square-root": 0.5, "none": 0.0}
"""By `schedule.lr_rule`: the learning rate follows the batch with this power."""


class Rule(ABC):
    """A schedule. Its methods are pure: same arguments, same answer, no clock, no tensors.

    A rule of one's own needs `initial` and `decide`; what else it wants to know or to set is in the
    methods below them.
    """

    @abstractmethod
    def initial(self) -> ScheduleState:
        """The state before the first step."""

    @abstractmethod
    def decide(self, state: ScheduleState, seen: Observation) -> Decision:
        """What to do at a boundary, with the state that holds from there on.

        `grow` goes with a larger global batch and `continue` with the same one.
        """

    def wants_eigenvalue(self, state: ScheduleState) -> bool:
        """Whether the next decision needs an estimate; asked before each decision point."""
        return False

    def threshold(self, state: ScheduleState) -> float | None:
        """Eigenvalue above which the next decision is `continue` however far above; None: any."""
        return None

    def wants_gradients(self, state: ScheduleState) -> bool:
        """Whether the next step is to be told by `learn`; that costs a pass over its gradients."""
        return False

    def learn(self, state: ScheduleState, squares: GradientSquares) -> ScheduleState:
        """The state after a step, with what it says of the gradient's noise."""
        return state

    def evidence(self, state: ScheduleState) -> Mapping[str, float]:
        """What the next decision will stand on besides the eigenvalue, for the event log."""
        return {}

    def recall(self, state: ScheduleState, told: Mapping[str, Any]) -> ScheduleState:
        """The state in which a recorded decision was made; `told` is its event, with `evidence`."""
        return state

    def lr(self, state: ScheduleState, epoch: float) -> float:
        """Learning rate of a step that begins `epoch` epochs into the run."""
        return state.lr

    def adversarial_fraction(self, state: ScheduleState, epoch: float) -> float:
        """Share of each microbatch that such a step replaces by adversarial examples."""
        return state.adversarial_fraction


@dataclass(frozen=True)
class Rate:
    """How the learning rate of a step follows from the state's: warm-up, then cosine."""

    warmup_epochs: float = 0.0
    warmup_from: float = 1.0
    """Fraction of the state's learning rate at the first step; it rises linearly to one."""
    cosine_until: float | None = None
    """Epochs at whose end the cosine reaches zero (Loshchilov and Hutter, arXiv:1608.03983, without
    restarts); None for milestones."""

    def at(self, lr: float, epoch: float) -> float:
        """The learning rate of a step that begins `epoch` epochs into the run."""
        if epoch < self.warmup_epochs:
            start = lr * self.warmup_from
            return start + (lr - start) * epoch / self.warmup_epochs
        if self.cosine_until is None:
            return lr
        done = (epoch - self.warmup_epochs) / (self.cosine_until - self.warmup_epochs)
        return lr * (1 + math.cos(math.pi * min(done, 1.0))) / 2


STEADY = Rate()
"""The state's learning rate as it is."""


@dataclass(frozen=True)
class Milestones:
    """Learning-rate decay at given epochs, common to the talk's schedules."""

    epochs: tuple[int, ...]
    decay: float
    """Factor ρ at each milestone."""

    def passed(self, epoch: float) -> int:
        """How many milestones lie at or before `epoch`."""
        return sum(1 for milestone in self.epochs if milestone <= epoch)

    def apply(self, state: ScheduleState, seen: Observation) -> tuple[ScheduleState, str]:
        """Decay for the milestones passed since the last boundary; with a sentence, or none."""
        passed = self.passed(seen.epoch)
        new = passed - state.milestones_passed
        if not new:
            return state, ""
        lr = state.lr * self.decay**new
        return (
            replace(state, lr=lr, milestones_passed=passed),
            f"milestone at epoch {self.epochs[passed - 1]}: learning rate "
            f"{state.lr:.4g} → {lr:.4g}",
        )


@dataclass(frozen=True)
class Growth:
    """From one batch to the next, and the learning rate with it."""

    beta: int
    """Factor of one growth."""
    max_batch: int
    """Samples; the last growth is cut to it."""
    lr_exponent: float = 1.0
    """One of `EXPONENTS`."""

    def possible(self, state: ScheduleState) -> bool:
        """Whether there is room."""
        return state.global_batch < self.max_batch

    def next_batch(self, state: ScheduleState) -> int:
        """`min(β·B, B_max)`."""
        return min(self.beta * state.global_batch, self.max_batch)

    def apply(self, state: ScheduleState) -> ScheduleState:
        """The state with the next batch, and with `lr ← lr·(B_new/B_old)^exponent`."""
        batch = self.next_batch(state)
        lr = state.lr * (batch / state.global_batch) ** self.lr_exponent
        return replace(state, global_batch=batch, lr=lr)
