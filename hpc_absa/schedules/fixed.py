"""The schedules that follow the learning rate's: BL, FB, GG and Seesaw."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

from hpc_absa.records import Decision, Observation, ScheduleState
from hpc_absa.schedules.base import EXPONENTS, BuiltInSchedule, LrRule, TrainSettings
from hpc_absa.section import NonNegative


class BL(BuiltInSchedule):
    """BL: constant batch, learning rate as given, decayed at milestones."""

    method: Literal["bl"] = "bl"
    """`bl`."""
    lr_rule: LrRule = "none"
    """As for all; BL keeps `train.lr` whatever the batch is (talk)."""

    def initial(self) -> ScheduleState:
        scale = (self.largest_batch / self.base_batch) ** EXPONENTS[self.lr_rule]
        return ScheduleState(self.largest_batch, self._train.lr * scale)

    def decide(self, state: ScheduleState, seen: Observation) -> Decision:
        state, reason = self._train.multi_step_lr.apply(state, seen)
        return Decision("continue", reason or "the batch is constant", state)

    def _warmup_start(self) -> float:
        if self.warmup_from is None and self.lr_rule != "none":
            return self._train.lr / self.initial().lr
        return super()._warmup_start()


class FB(BL):
    """FB: constant batch, learning rate scaled with it after a warm-up (Goyal)."""

    method: Literal["fb"] = "fb"  # type: ignore[assignment]
    """`fb`."""
    lr_rule: LrRule = "linear"
    """As for all (Goyal, section 2.1)."""
    warmup_epochs: NonNegative = 5.0
    """Epochs of linear warm-up from `lr` to `lr · B/B0` (Goyal, section 2.2)."""


class GG(BuiltInSchedule):
    """GG: the batch grows by 1/ρ at each milestone instead of the learning rate's decay (Smith).

    If the batch cannot grow by all of 1/ρ, the learning rate decays by the rest.
    """

    method: Literal["gg"] = "gg"
    """`gg`."""
    lr_rule: LrRule = "none"
    """As for all; growth replaces the decay, so the learning rate stays (Smith)."""

    def check(self, train: TrainSettings) -> None:
        super().check(train)
        if train.annealing == "cosine":
            raise ValueError(
                "train.annealing = 'cosine': expected 'milestones', at which schedule.method = "
                "'gg' grows"
            )

    def decide(self, state: ScheduleState, seen: Observation) -> Decision:
        train, passed = self._train, self._passed(seen.epoch)
        new = passed - state.milestones_passed
        if new <= 0:  # fewer where a run is continued with other milestones or more epochs
            return Decision("continue", "no milestone reached", state)
        factor = train.lr_decay**-new
        wanted = round(state.global_batch * factor / train.microbatch) * train.microbatch
        batch = min(wanted, self.largest_batch)
        lr = self._lr_after(state, batch, factor)
        grows = batch > state.global_batch
        limit = "its maximum " if batch == self.largest_batch else ""
        change = f"{state.global_batch} → {batch}" if grows else f"stays at {limit}{batch}"
        reason = f"{self._occasion(passed)}: batch {change}"
        if abs(lr / state.lr - 1) > 1e-9:
            reason += f", learning rate {state.lr:.4g} → {lr:.4g}"
        after = replace(state, global_batch=batch, lr=lr, milestones_passed=passed)
        if grows:
            return Decision("grow", reason, after, "schedule")
        return Decision("continue", reason, after)

    def _passed(self, epoch: float) -> int:
        return self._train.multi_step_lr.passed(epoch)

    def _occasion(self, passed: int) -> str:
        return f"milestone at epoch {self._train.milestones[passed - 1]}"

    def _lr_after(self, state: ScheduleState, batch: int, factor: float) -> float:
        """The learning rate after a milestone at which the batch should grow by `factor`."""
        grown = batch / state.global_batch
        return state.lr * batch / (state.global_batch * factor) * grown ** EXPONENTS[self.lr_rule]


class Seesaw(GG):
    """Seesaw: where the learning rate would decay by ρ, it decays by √ρ and the batch grows by 1/ρ.

    With Adam, whose steps are normalized, that has the effect of the decay as long as noise
    dominates the gradient (arXiv:2510.14717, whose ρ is 1/2); with SGD the equivalent is `gg`, or
    `lr_rule = "linear"` here. If the batch cannot grow by all of 1/ρ, the learning rate decays by
    more: `lr ← lr·ρ·(B_new/B_old)^½`. With `train.annealing = "cosine"` this happens whenever the
    cosine has fallen by another factor ρ, in place of the continuous decay.
    """

    method: Literal["seesaw"] = "seesaw"  # type: ignore[assignment]
    """`seesaw`."""
    lr_rule: LrRule = "square-root"
    """As for all, applied on top of the decay by ρ (arXiv:2510.14717)."""

    def check(self, train: TrainSettings) -> None:
        BuiltInSchedule.check(self, train)
        if train.annealing == "cosine" and train.lr_decay == 1:
            raise ValueError(
                "train.lr_decay = 1: expected less with schedule.method = 'seesaw' and "
                "train.annealing = 'cosine', which is followed in steps of this factor"
            )

    def lr(self, state: ScheduleState, epoch: float) -> float:
        return self._warmed_up(state.lr, epoch)

    def unchanged(self, state: ScheduleState, epoch: float, growing: bool) -> tuple[float, float]:
        train = self._train
        if train.annealing != "cosine":
            return super().unchanged(state, epoch, growing)
        fraction = train.lr_decay ** ((state.milestones_passed + 1) / 2)  # a cosine of half angle
        done = 2 / math.pi * math.acos(fraction)
        return math.inf, self.warmup_epochs + (train.epochs - self.warmup_epochs) * done - 1e-6

    def _passed(self, epoch: float) -> int:
        """Decays by ρ that the milestones, or the cosine, have had."""
        train = self._train
        if train.annealing != "cosine":
            return super()._passed(epoch)
        left = min(1.0, (train.epochs - epoch) / (train.epochs - self.warmup_epochs))
        fraction = max(math.sin(math.pi / 2 * left) ** 2, 1e-30)
        return math.floor(math.log(fraction) / math.log(train.lr_decay) + 1e-9)

    def _occasion(self, passed: int) -> str:
        if self._train.annealing != "cosine":
            return super()._occasion(passed)
        return f"cosine at {self._train.lr_decay**passed:.4g}"

    def _lr_after(self, state: ScheduleState, batch: int, factor: float) -> float:
        grown = batch / state.global_batch
        return state.lr / factor * grown ** EXPONENTS[self.lr_rule]
