"""The schedules of constant batch: BL, the baseline, and FB (Goyal et al., arXiv:1706.02677)."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_absa.records import Decision, Observation, ScheduleState
from hpc_absa.schedules.rule import STEADY, Milestones, Rate, Rule


@dataclass(frozen=True)
class Constant(Rule):
    """A constant batch; at each milestone `lr ← lr·ρ`.

    BL has `lr0` whatever the batch is; FB has `lr0·B/B0` and reaches it from `lr0` by a linear
    warm-up (Goyal, section 2.2).
    """

    global_batch: int
    base_lr: float
    """Of this batch."""
    milestones: Milestones
    rate: Rate = STEADY

    def initial(self) -> ScheduleState:
        """The batch and its learning rate."""
        return ScheduleState(self.global_batch, self.base_lr)

    def decide(self, state: ScheduleState, seen: Observation) -> Decision:
        """Continue, with the learning rate decayed at milestones."""
        state, reason = self.milestones.apply(state, seen)
        return Decision("continue", reason or "the batch is constant", state)

    def lr(self, state: ScheduleState, epoch: float) -> float:
        """The state's own, through warm-up and cosine."""
        return self.rate.at(state.lr, epoch)
