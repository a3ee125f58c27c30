"""ABS and ABSA: the batch grows when the loss surface has become flatter (arXiv:1810.01021)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from hpc_absa.records import Decision, Eigenvalue, Observation, ScheduleState
from hpc_absa.schedules.rule import STEADY, Growth, Milestones, Rate, Rule


@dataclass(frozen=True)
class Adversarial:
    """How ABSA's share of adversarial examples fades."""

    ratio: float
    """Share r at the start."""
    omega: float
    """Divisor of r at each growth."""
    until: float
    """Epochs after which r = 0: half of the run (talk)."""


@dataclass(frozen=True)
class AdaptiveBatch(Rule):
    """If `λ ≤ λ_ref/α`: `B ← min(β·B, B_max)`, `lr ← lr·B_new/B_old`, `λ_ref ← λ`.

    The first trustworthy λ becomes the reference. After κ decision points without growth the batch
    grows all the same. An eigenvalue that is unconverged, not finite or not positive is no
    evidence: it neither grows the batch nor becomes a reference, though patience runs on.
    """

    base_batch: int
    base_lr: float
    growth: Growth
    alpha: float
    kappa: int
    milestones: Milestones
    estimate_every: int = 1
    """Decision points from one estimate to the next before the first growth."""
    adversarial: Adversarial | None = None
    rate: Rate = STEADY

    def initial(self) -> ScheduleState:
        """The base batch, with adversarial examples where there is room to grow."""
        state = ScheduleState(self.base_batch, self.base_lr)
        if self.adversarial and self.growth.possible(state):
            return replace(state, adversarial_fraction=self.adversarial.ratio)
        return state

    def wants_eigenvalue(self, state: ScheduleState) -> bool:
        """Until the batch has reached its maximum, and early on not at every decision point."""
        if not self.growth.possible(state):
            return False
        point = state.patience_count + 1
        return (
            state.global_batch > self.base_batch
            or state.reference is None
            or point % self.estimate_every == 0
            or point >= self.kappa
        )

    def threshold(self, state: ScheduleState) -> float | None:
        """`λ_ref/α`; None where the value itself will be the reference, as when patience ends."""
        if state.reference is None or state.patience_count + 1 >= self.kappa:
            return None
        return state.reference / self.alpha

    def decide(self, state: ScheduleState, seen: Observation) -> Decision:
        """Milestones first, then growth; both may come at the same boundary."""
        state, milestone = self.milestones.apply(state, seen)
        if self.adversarial and seen.epoch >= self.adversarial.until:
            state = replace(state, adversarial_fraction=0.0)
        if not seen.decision_point:
            return Decision("continue", milestone or "no decision point", state)
        if not self.growth.possible(state):
            reason = f"batch is at its maximum {self.growth.max_batch}"
            return Decision("continue", milestone or reason, state)
        decision = self._decide_growth(
            replace(state, patience_count=state.patience_count + 1), seen.eigenvalue
        )
        return replace(decision, reason="; ".join(filter(None, [decision.reason, milestone])))

    def lr(self, state: ScheduleState, epoch: float) -> float:
        """The state's own, through warm-up and cosine; growth, in steps of β, has none (talk)."""
        return self.rate.at(state.lr, epoch)

    def adversarial_fraction(self, state: ScheduleState, epoch: float) -> float:
        """The state's own, and none from the very step on that begins after half of the epochs."""
        over = self.adversarial is not None and epoch >= self.adversarial.until
        return 0.0 if over else state.adversarial_fraction

    def _decide_growth(self, state: ScheduleState, eigenvalue: Eigenvalue | None) -> Decision:
        value, doubt = _trusted(eigenvalue)
        reference = state.reference
        if eigenvalue is not None and eigenvalue.stopped_above_threshold and reference is not None:
            above = f"λ above {reference:.4g}/{self.alpha:g} (at least {eigenvalue.value:.4g})"
            if state.patience_count < self.kappa:
                return Decision("continue", above, state)
        if value is not None and reference is not None and value <= reference / self.alpha:
            return self._grow(state, value, f"λ {value:.4g} ≤ {reference:.4g}/{self.alpha:g}")
        if state.patience_count >= self.kappa:
            why = f"no growth for {state.patience_count} decisions"
            return self._grow(state, value, f"{doubt}; {why}" if doubt else why)
        if doubt:
            return Decision("continue", f"{doubt}: no growth", state)
        if reference is None:
            first = f"λ {value:.4g} is the reference"
            return Decision("continue", first, replace(state, reference=value))
        return Decision("continue", f"λ {value:.4g} > {reference:.4g}/{self.alpha:g}", state)

    def _grow(self, state: ScheduleState, value: float | None, why: str) -> Decision:
        grown = self.growth.apply(state)
        fraction = state.adversarial_fraction / self.adversarial.omega if self.adversarial else 0.0
        grown = replace(
            grown,
            adversarial_fraction=fraction if self.growth.possible(grown) else 0.0,
            reference=value if value is not None else state.reference,
            patience_count=0,
        )
        why += f": batch {state.global_batch} → {grown.global_batch}"
        return Decision("grow", why, grown)


def _trusted(eigenvalue: Eigenvalue | None) -> tuple[float | None, str]:
    """The value where it may be acted on; otherwise None and what is wrong with it."""
    if eigenvalue is None:
        return None, "λ was not estimated"
    value = eigenvalue.value
    if not math.isfinite(value):
        return None, "λ is not finite"
    if not eigenvalue.converged:
        return None, f"λ {value:.4g} has not converged (residual {eigenvalue.residual:.2g})"
    if value <= 0:
        return None, f"λ {value:.4g} is not positive"
    return value, ""
