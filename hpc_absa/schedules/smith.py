"""GG: don't decay the learning rate, increase the batch size (Smith et al., arXiv:1711.00489)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hpc_absa.records import Decision, Observation, ScheduleState
from hpc_absa.schedules.rule import STEADY, Milestones, Rate, Rule


@dataclass(frozen=True)
class GoogleRule(Rule):
    """At each milestone `B ← B/ρ` up to the cap; what the cap refuses goes to the learning rate."""

    base_batch: int
    max_batch: int
    microbatch: int
    base_lr: float
    milestones: Milestones
    lr_exponent: float = 0.0
    """Growth stands for the decay, so the learning rate stays; else `lr ← lr·(B_new/B_old)^e`."""
    rate: Rate = STEADY

    def initial(self) -> ScheduleState:
        """The base batch and the job's learning rate."""
        return ScheduleState(self.base_batch, self.base_lr)

    def decide(self, state: ScheduleState, seen: Observation) -> Decision:
        """Grow at milestones, otherwise continue."""
        passed = self.milestones.passed(seen.epoch)
        new = passed - state.milestones_passed
        if not new:
            return Decision("continue", "no milestone reached", state)
        factor = self.milestones.decay**-new
        wanted = round(state.global_batch * factor / self.microbatch) * self.microbatch
        batch = min(wanted, self.max_batch)
        grown = batch / state.global_batch
        lr = state.lr * batch / (state.global_batch * factor) * grown**self.lr_exponent
        moved = f"milestone at epoch {self.milestones.epochs[passed - 1]}: "
        moved += (
            f"batch {state.global_batch} → {batch}"
            if batch > state.global_batch
            else f"batch stays at its maximum {batch}"
        )
        if abs(lr / state.lr - 1) > 1e-9:
            moved += f", learning rate {state.lr:.4g} → {lr:.4g}"
        return Decision(
            "grow" if batch > state.global_batch else "continue",
            moved,
            replace(state, global_batch=batch, lr=lr, milestones_passed=passed),
        )

    def lr(self, state: ScheduleState, epoch: float) -> float:
        """The state's own, through a warm-up where the job has one."""
        return self.rate.at(state.lr, epoch)
