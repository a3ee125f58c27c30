"""GNS: the batch follows the gradient noise scale (McCandlish et al., arXiv:1812.06162)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hpc_absa.records import Decision, GradientSquares, Observation, ScheduleState
from hpc_absa.schedules.rule import STEADY, Growth, Milestones, Rate, Rule


@dataclass(frozen=True)
class NoiseState(ScheduleState):
    """With both moments of the gradient, summed over the steps since the last decision point."""

    noise: float = 0.0
    """Sum of the unbiased estimates of tr Σ, the variance of one sample's gradient."""
    signal: float = 0.0
    """Sum of the unbiased estimates of ‖G‖², G the gradient of the whole loss."""
    steps: int = 0
    """Steps behind both."""


@dataclass(frozen=True)
class NoiseScale(Rule):
    """If `β·B ≤ γ·tr Σ/‖G‖²`: `B ← min(β·B, B_max)`, the learning rate by the job's rule.

    Both moments come from the squared norms of the microbatches' gradients and of their mean
    (appendix A.1 there, with `B_small = b` and `B_big = M·b`), each averaged over all steps since
    the last decision point before the quotient is taken, because a single step's quotient is biased
    and wild. A noise scale that is not finite or not positive is no evidence.
    """

    base_batch: int
    base_lr: float
    growth: Growth
    gamma: float
    """Batch that is wanted, in noise scales."""
    microbatch: int
    milestones: Milestones
    rate: Rate = STEADY

    def initial(self) -> NoiseState:
        """The base batch and the job's learning rate."""
        return NoiseState(self.base_batch, self.base_lr)

    def wants_gradients(self, state: ScheduleState) -> bool:
        """Until the batch has reached its maximum."""
        return self.growth.possible(state)

    def learn(self, state: ScheduleState, squares: GradientSquares) -> NoiseState:
        """Add one step's moments; a step of one microbatch says nothing of the noise."""
        before = _own(state)
        M, b = squares.microbatches, self.microbatch
        if M < 2:
            return before
        signal = (M * squares.mean - squares.each) / (M - 1)
        noise = (squares.each - squares.mean) / (1 / b - 1 / (M * b))
        return replace(
            before,
            noise=before.noise + noise,
            signal=before.signal + signal,
            steps=before.steps + 1,
        )

    def evidence(self, state: ScheduleState) -> Mapping[str, float]:
        """The noise scale in samples and the sums behind it."""
        known = _own(state)
        if not known.steps:
            return {}
        return {
            "noise_scale": _scale(known),
            "gradient_noise": known.noise / known.steps,
            "gradient_signal": known.signal / known.steps,
        }

    def recall(self, state: ScheduleState, told: Mapping[str, Any]) -> NoiseState:
        """With the event's means of both moments, as though of one step."""
        noise, signal = told.get("gradient_noise"), told.get("gradient_signal")
        if noise is None and signal is None and "noise_scale" not in told:
            return _own(state)
        # What was not finite is null in an event.
        known = [math.nan if value is None else float(value) for value in (noise, signal)]
        return replace(_own(state), noise=known[0], signal=known[1], steps=1)

    def decide(self, state: ScheduleState, seen: Observation) -> Decision:
        """Milestones first, then growth; both may come at the same boundary."""
        decayed, milestone = self.milestones.apply(state, seen)
        if not seen.decision_point:
            return Decision("continue", milestone or "no decision point", decayed)
        fresh = replace(_own(decayed), noise=0.0, signal=0.0, steps=0)
        grows, why = self._verdict(_own(state))
        after: ScheduleState = fresh
        if grows:
            after = self.growth.apply(fresh)
            why += f": batch {state.global_batch} → {after.global_batch}"
        return Decision(
            "grow" if grows else "continue", "; ".join(filter(None, [why, milestone])), after
        )

    def lr(self, state: ScheduleState, epoch: float) -> float:
        """The state's own, through warm-up and cosine."""
        return self.rate.at(state.lr, epoch)

    def _verdict(self, state: NoiseState) -> tuple[bool, str]:
        if not self.growth.possible(state):
            return False, f"batch is at its maximum {self.growth.max_batch}"
        if not state.steps:
            return False, "no step of two microbatches or more: no growth"
        scale = _scale(state)
        if not math.isfinite(scale):
            return False, "noise scale is not finite: no growth"
        if scale <= 0:
            return False, f"noise scale {scale:.4g} is not positive: no growth"
        wanted = self.growth.next_batch(state)
        if wanted <= self.gamma * scale:
            return True, f"{wanted} ≤ {self.gamma:g} × noise scale {scale:.4g}"
        return False, f"{wanted} > {self.gamma:g} × noise scale {scale:.4g}"


def _own(state: ScheduleState) -> NoiseState:
    assert isinstance(state, NoiseState), "states of another schedule are refused on resuming"
    return state


def _scale(state: NoiseState) -> float:
    """`tr Σ/‖G‖²` in samples; NaN where either moment is negative or not finite."""
    noise, signal = state.noise, state.signal
    if not (math.isfinite(noise) and math.isfinite(signal)) or signal <= 0:
        return math.nan
    return noise / signal
