"""The schedules without measurements: BL, FB (arXiv:1706.02677) and GG (arXiv:1711.00489)."""

from __future__ import annotations

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
        train = self._train
        passed = train.multi_step_lr.passed(seen.epoch)
        new = passed - state.milestones_passed
        if not new:
            return Decision("continue", "no milestone reached", state)
        factor = train.lr_decay**-new
        wanted = round(state.global_batch * factor / train.microbatch) * train.microbatch
        batch = min(wanted, self.largest_batch)
        grown = batch / state.global_batch
        lr = state.lr * batch / (state.global_batch * factor) * grown ** EXPONENTS[self.lr_rule]
        grows = batch > state.global_batch
        change = f"{state.global_batch} → {batch}" if grows else f"stays at its maximum {batch}"
        reason = f"milestone at epoch {train.milestones[passed - 1]}: batch {change}"
        if abs(lr / state.lr - 1) > 1e-9:
            reason += f", learning rate {state.lr:.4g} → {lr:.4g}"
        after = replace(state, global_batch=batch, lr=lr, milestones_passed=passed)
        return Decision("grow" if grows else "continue", reason, after)
