"""The interface of all schedules."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from hpc_absa.records import Decision, GradientSquares, Observation, ScheduleState


class Rule(ABC):
    """A schedule of batch size and learning rate. Its methods are pure: no clock, no tensors.

    A user-defined rule implements `initial` and `decide`; the other methods are optional.
    """

    @abstractmethod
    def initial(self) -> ScheduleState:
        """The state before the first step."""

    @abstractmethod
    def decide(self, state: ScheduleState, seen: Observation) -> Decision:
        """What to do at a boundary, with the state that holds from there on.

        `grow` comes with a larger global batch and `continue` with the same one.
        """

    def wants_eigenvalue(self, state: ScheduleState) -> bool:
        """Whether the next decision point needs an estimate of the eigenvalue."""
        return False

    def threshold(self, state: ScheduleState) -> float | None:
        """If λ is above this, the next decision is `continue`, whatever λ is exactly.

        The estimate may stop early there. None if the value of λ is needed.
        """
        return None

    def wants_gradients(self, state: ScheduleState) -> bool:
        """Whether to call `learn` after the next step; costs one more pass over its gradients."""
        return False

    def learn(self, state: ScheduleState, squares: GradientSquares) -> ScheduleState:
        """The state after a step, updated with its squared gradient norms."""
        return state

    def evidence(self, state: ScheduleState) -> Mapping[str, float]:
        """What the next decision is based on besides the eigenvalue, for its event."""
        return {}

    def recall(self, state: ScheduleState, event: Mapping[str, Any]) -> ScheduleState:
        """The state in which a recorded decision was made, from its event (with `evidence`)."""
        return state

    def unchanged(self, state: ScheduleState, epoch: float, growing: bool) -> tuple[float, float]:
        """How many decision points, and until which epoch, nothing changes; for the planner.

        Decisions at the next so many decision points that come before that epoch leave batch and
        learning rate as they are. (0, `epoch`) claims nothing.

        Args:
            state: at `epoch`.
            epoch: of the next boundary.
            growing: whether measurements make the batch grow whenever they can, or never.
        """
        return 0, epoch

    def after_unchanged(self, state: ScheduleState, points: int) -> ScheduleState:
        """The state after so many of the decision points that `unchanged` counts."""
        return state

    def lr(self, state: ScheduleState, epoch: float) -> float:
        """Learning rate of a step that begins `epoch` epochs into the run."""
        return state.lr

    def adversarial_fraction(self, state: ScheduleState, epoch: float) -> float:
        """Fraction of each microbatch of that step that is replaced by adversarial examples."""
        return state.adversarial_fraction
