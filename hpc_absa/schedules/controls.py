"""Random growth: what a batch that grows as often, but at any time, would have done."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from hpc_absa.records import Decision, Observation, ScheduleState
from hpc_absa.schedules.base import FactorSchedule


@dataclass(frozen=True)
class RandomState(ScheduleState):
    growths: int = 0


class RandomGrowth(FactorSchedule):
    """Random: at each decision point the batch grows with the same probability.

    A control for methods that measure: with their number of growths per decision point as `rate`,
    the batch grows as often, but not where the measurement says. The decision points between two
    growths are drawn from the geometric distribution by the job's seed, so plans are exact.
    """

    method: Literal["random"] = "random"
    """`random`."""
    rate: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Probability of growth at a decision point, the reciprocal of the mean number between growths
    (ours: as often as by patience alone)."""

    def initial(self) -> RandomState:
        return RandomState(self.base_batch, self._train.lr)

    def after_unchanged(self, state: ScheduleState, points: int) -> ScheduleState:
        if not self.can_grow(state):
            return state
        return replace(state, patience_count=state.patience_count + points)

    def _points_without_growth(self, state: ScheduleState, growing: bool) -> float:
        return self._gap(state) - state.patience_count - 1

    def _decide_growth(self, state: ScheduleState, seen: Observation) -> Decision:
        gap, waited = self._gap(state), state.patience_count + 1
        if waited < gap:
            reason = f"drawn: growth after {gap} decisions, {waited} so far"
            return Decision("continue", reason, replace(state, patience_count=waited))
        grown = replace(_random_state(state), growths=_random_state(state).growths + 1)
        grown = replace(grown, patience_count=0)
        reason = f"drawn: growth after {gap} decisions"
        return Decision("grow", reason, self.grow(grown, self.next_batch(state)), "random")

    def _gap(self, state: ScheduleState) -> int:
        """Decision points from the last growth to the next."""
        if self.rate == 1:
            return 1
        uniform = random.Random(f"{self._seed} {_random_state(state).growths}").random()
        return 1 + math.floor(math.log1p(-uniform) / math.log1p(-self.rate))


def _random_state(state: ScheduleState) -> RandomState:
    assert isinstance(state, RandomState), "resuming refuses states of another schedule"
    return state
