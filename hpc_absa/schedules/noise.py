"""GNS: the batch follows the gradient noise scale (McCandlish et al., arXiv:1812.06162)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from hpc_absa.records import Decision, GradientSquares, Observation, ScheduleState
from hpc_absa.schedules.base import GrowingSchedule, TrainSettings
from hpc_absa.section import Positive


@dataclass(frozen=True)
class NoiseState(ScheduleState):
    """With both moments of the gradient, summed over the steps since the last decision point."""

    noise: float = 0.0
    """Sum of the unbiased estimates of tr Σ, the variance of one sample's gradient."""
    signal: float = 0.0
    """Sum of the unbiased estimates of ‖G‖², G the gradient of the whole loss."""
    steps: int = 0

    @property
    def scale(self) -> float:
        """`tr Σ/‖G‖²` in samples; NaN if a moment is not finite or ‖G‖² is not positive."""
        if not (math.isfinite(self.noise) and math.isfinite(self.signal)) or self.signal <= 0:
            return math.nan
        return self.noise / self.signal


class GNS(GrowingSchedule):
    """GNS: the batch grows up to the gradient noise scale.

    If `β·B ≤ γ·tr Σ/‖G‖²`: `B ← min(β·B, B_max)`, and the learning rate follows by `lr_rule`. Both
    moments come from the squared norms of the microbatches' gradients and of their mean (appendix
    A.1 of the paper, with `B_small = b` and `B_big = M·b`). Each is averaged over all steps since
    the last decision point before the quotient is taken, because a single step's quotient is
    biased and scatters widely. A noise scale that is not finite or not positive is ignored.
    """

    method: Literal["gns"] = "gns"
    """`gns`."""
    gamma: Positive = 1.0
    """Noise scales that the batch may reach: at one, a step makes as much progress as half as many
    samples would without noise (arXiv:1812.06162, section 2.2)."""

    def check(self, train: TrainSettings) -> None:
        super().check(train)
        if self.base_batch < 2 * train.microbatch:
            raise ValueError(
                f"schedule.base_batch = {self.base_batch}: expected at least two microbatches of "
                f"{train.microbatch}, whose gradients gns compares; halve train.microbatch"
            )

    def initial(self) -> NoiseState:
        return NoiseState(self.base_batch, self._train.lr)

    def wants_gradients(self, state: ScheduleState) -> bool:
        return self.can_grow(state)

    def learn(self, state: ScheduleState, squares: GradientSquares) -> NoiseState:
        """Add one step's moments; a step of one microbatch has no information on the noise."""
        before = _noise_state(state)
        M, b = squares.microbatches, self._train.microbatch
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
        """The noise scale in samples, and the means of both moments."""
        known = _noise_state(state)
        if not known.steps:
            return {}
        return {
            "noise_scale": known.scale,
            "gradient_noise": known.noise / known.steps,
            "gradient_signal": known.signal / known.steps,
        }

    def recall(self, state: ScheduleState, event: Mapping[str, Any]) -> NoiseState:
        """With the event's means of both moments as the sums over one step."""
        noise, signal = event.get("gradient_noise"), event.get("gradient_signal")
        if noise is None and signal is None and "noise_scale" not in event:
            return _noise_state(state)
        # Events have null for what is not finite.
        numbers = [v if isinstance(v, int | float) else math.nan for v in (noise, signal)]
        known = list(map(float, numbers))
        return replace(_noise_state(state), noise=known[0], signal=known[1], steps=1)

    def _points_without_growth(self, state: ScheduleState, growing: bool) -> float:
        return 0 if growing else math.inf

    def _decide_growth(self, state: ScheduleState, seen: Observation) -> Decision:
        known = _noise_state(state)
        fresh = replace(known, noise=0.0, signal=0.0, steps=0)
        if not known.steps:
            return Decision("continue", "no step of two microbatches or more: no growth", fresh)
        if not math.isfinite(known.scale):
            return Decision("continue", "noise scale is not finite: no growth", fresh)
        if known.scale <= 0:
            reason = f"noise scale {known.scale:.4g} is not positive: no growth"
            return Decision("continue", reason, fresh)
        batch, limit = self.next_batch(state), f"{self.gamma:g} × noise scale {known.scale:.4g}"
        if batch <= self.gamma * known.scale:
            return Decision("grow", f"{batch} ≤ {limit}", self.grow(fresh))
        return Decision("continue", f"{batch} > {limit}", fresh)


def _noise_state(state: ScheduleState) -> NoiseState:
    assert isinstance(state, NoiseState), "resuming refuses states of another schedule"
    return state
