"""GNS and the norm test: the batch follows the noise of the gradient."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from hpc_absa.records import Decision, GradientSquares, Observation, ScheduleState
from hpc_absa.schedules.base import FactorSchedule, GrowingSchedule, LrRule, TrainSettings
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


class GradientSchedule(GrowingSchedule):
    """Base of the methods that watch the noise of the gradient.

    Both moments come from the squared norms of the microbatches' gradients and of their mean
    (arXiv:1812.06162, appendix A.1, with `B_small = b` and `B_big = M·b`). Each is averaged over
    all steps since the last decision point before a quotient is taken, because a single step's
    quotient is biased and scatters widely.
    """

    def check(self, train: TrainSettings) -> None:
        super().check(train)
        if self.base_batch < 2 * train.microbatch:
            raise ValueError(
                f"schedule.base_batch = {self.base_batch}: expected at least two microbatches of "
                f"{train.microbatch}, whose gradients {self.method} compares; halve "  # type: ignore[attr-defined]
                "train.microbatch"
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
        batch, reason = self._growth(known)
        if batch is None:
            return Decision("continue", reason, fresh)
        return Decision("grow", reason, self.grow(fresh, batch), "gradients")

    @abstractmethod
    def _growth(self, known: NoiseState) -> tuple[int | None, str]:
        """The larger batch, or None for no growth; and the reason."""


class GNS(GradientSchedule, FactorSchedule):
    """GNS: the batch grows up to the gradient noise scale.

    If `β·B ≤ γ·tr Σ/‖G‖²`: `B ← min(β·B, B_max)`, and the learning rate follows by `lr_rule`. A
    noise scale that is not finite or not positive is ignored.
    """

    method: Literal["gns"] = "gns"
    """`gns`."""
    gamma: Positive = 1.0
    """Noise scales that the batch may reach: at one, a step makes as much progress as half as many
    samples would without noise (arXiv:1812.06162, section 2.2)."""

    def _growth(self, known: NoiseState) -> tuple[int | None, str]:
        if not math.isfinite(known.scale):
            return None, "noise scale is not finite: no growth"
        if known.scale <= 0:
            return None, f"noise scale {known.scale:.4g} is not positive: no growth"
        batch, limit = self.next_batch(known), f"{self.gamma:g} × noise scale {known.scale:.4g}"
        return (
            (batch, f"{batch} ≤ {limit}")
            if batch <= self.gamma * known.scale
            else (None, f"{batch} > {limit}")
        )


class NormTest(GradientSchedule):
    """Norm test: the batch grows until the noise of its gradient is a fraction η of the gradient.

    The test is `tr Σ/B ≤ η²·‖g‖²`, with g the gradient of the whole batch (Byrd et al., Math.
    Program. 134, 2012; arXiv:2402.11215; over ranks arXiv:2412.21124). Where it fails,
    `B ← min(⌈tr Σ/(η²·‖g‖²)⌉, B_max)`, rounded up to whole microbatches.
    """

    method: Literal["norm-test"] = "norm-test"
    """`norm-test`."""
    eta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Largest ratio η of noise to gradient (the value of arXiv:2402.11215 for CIFAR-10)."""
    lr_rule: LrRule = "none"
    """As for all; the paper's learning rate has a schedule of its own."""

    def _growth(self, known: NoiseState) -> tuple[int | None, str]:
        B, b = known.global_batch, self._train.microbatch
        noise, signal = known.noise / known.steps, known.signal / known.steps
        squared = signal + noise / B  # of the batch's gradient, which the test compares with
        ratio = noise / B / squared if squared > 0 else math.nan
        if not math.isfinite(ratio):
            return None, "the gradient's moments are not finite or not positive: no growth"
        compared = f"noise {math.sqrt(max(ratio, 0)):.4g} of the gradient, η {self.eta:g}"
        if ratio <= self.eta**2:
            return None, compared
        wanted = math.ceil(ratio * B / self.eta**2 / b - 1e-9) * b
        return min(max(wanted, B + b), self.largest_batch), compared


def _noise_state(state: ScheduleState) -> NoiseState:
    assert isinstance(state, NoiseState), "resuming refuses states of another schedule"
    return state
