"""The schedules of constant batch: BL, the baseline, and FB (Goyal et al., arXiv:1706.02677)."""

from __future__ import annotations

from dataclasses import dataclass

from hpc_absa.records import Decision, Observation, ScheduleState
from hpc_absa.schedules.rule import Milestones


@dataclass(frozen=True)
class Baseline:
    """BL: `lr` whatever the batch is; at each milestone `lr ← lr·ρ`."""

    global_batch: int
    base_lr: float
    milestones: Milestones

    def initial(self) -> ScheduleState:
        """The batch and learning rate of the job."""
        return ScheduleState(self.global_batch, self.base_lr)

    def wants_eigenvalue(self, state: ScheduleState) -> bool:
        """Never: curvature decides nothing here."""
        return False

    def threshold(self, state: ScheduleState) -> float | None:
        """None: there is no estimate to cut short."""
        return None

    def decide(self, state: ScheduleState, seen: Observation) -> Decision:
        """Continue, with the learning rate decayed at milestones."""
        state, reason = self.milestones.apply(state, seen)
        return Decision("continue", reason or "the batch is constant", state)

    def lr(self, state: ScheduleState, epoch: float) -> float:
        """The state's own."""
        return state.lr


@dataclass(frozen=True)
class FacebookRule(Baseline):
    """FB: `lr = lr0·B/B0`, reached from `lr0` by a linear warm-up; milestones as BL."""

    base_batch: int
    """Batch that `base_lr` belongs to."""
    warmup_epochs: float

    def initial(self) -> ScheduleState:
        """The constant batch with the learning rate scaled to it."""
        return ScheduleState(self.global_batch, self.base_lr * self.global_batch / self.base_batch)

    def lr(self, state: ScheduleState, epoch: float) -> float:
        """Linear from `lr0` to the scaled learning rate over the warm-up (Goyal, section 2.2)."""
        if epoch >= self.warmup_epochs:
            return state.lr
        start = state.lr * self.base_batch / self.global_batch
        return start + (state.lr - start) * epoch / self.warmup_epochs
