"""A user's own rule, `schedule.method = "package.module:Class"`, held to what a rule promises."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hpc_absa import plugins
from hpc_absa.errors import UsageError
from hpc_absa.records import Decision, GradientSquares, Observation, ScheduleState
from hpc_absa.schedules.rule import Rule

T = TypeVar("T")


class OwnRule(Rule):
    """Passes every question on and checks the answer, so that a mistake is one line and no hang."""

    def __init__(self, rule: Rule, name: str, microbatch: int) -> None:
        """`name` is what the job calls it, for messages."""
        self._rule, self._name, self._microbatch = rule, name, microbatch

    def initial(self) -> ScheduleState:
        """The user's, checked."""
        return self._state("initial", self._ask("initial", self._rule.initial))

    def decide(self, state: ScheduleState, seen: Observation) -> Decision:
        """The user's, checked."""
        decision = self._ask("decide", lambda: self._rule.decide(state, seen))
        if not isinstance(decision, Decision):
            raise self._wrong("decide", _kind(decision), "a hpc_absa.records.Decision")
        if decision.action not in ("continue", "grow"):
            raise self._wrong("decide", f"action {decision.action!r}", "'continue' or 'grow'")
        self._state("decide", decision.state)
        before, after = state.global_batch, decision.state.global_batch
        if (decision.action == "grow") != (after > before) or after < before:
            raise self._wrong(
                "decide",
                f"{decision.action!r} with batch {before} → {after}",
                "'grow' with a larger batch, or 'continue' with the same",
            )
        return decision

    def wants_eigenvalue(self, state: ScheduleState) -> bool:
        """The user's."""
        return bool(self._ask("wants_eigenvalue", lambda: self._rule.wants_eigenvalue(state)))

    def threshold(self, state: ScheduleState) -> float | None:
        """The user's."""
        return self._ask("threshold", lambda: self._rule.threshold(state))

    def wants_gradients(self, state: ScheduleState) -> bool:
        """The user's."""
        return bool(self._ask("wants_gradients", lambda: self._rule.wants_gradients(state)))

    def learn(self, state: ScheduleState, squares: GradientSquares) -> ScheduleState:
        """The user's, checked."""
        return self._state("learn", self._ask("learn", lambda: self._rule.learn(state, squares)))

    def evidence(self, state: ScheduleState) -> Mapping[str, float]:
        """The user's."""
        return self._ask("evidence", lambda: self._rule.evidence(state))

    def recall(self, state: ScheduleState, told: Mapping[str, Any]) -> ScheduleState:
        """The user's, checked."""
        return self._state("recall", self._ask("recall", lambda: self._rule.recall(state, told)))

    def lr(self, state: ScheduleState, epoch: float) -> float:
        """The user's, checked."""
        lr = self._ask("lr", lambda: self._rule.lr(state, epoch))
        if not _number(lr) or lr < 0:
            raise self._wrong("lr", repr(lr), "a finite learning rate, 0 or more")
        return float(lr)

    def adversarial_fraction(self, state: ScheduleState, epoch: float) -> float:
        """The user's, checked."""
        ask = self._rule.adversarial_fraction
        fraction = self._ask("adversarial_fraction", lambda: ask(state, epoch))
        if not _number(fraction) or not 0 <= fraction <= 1:
            raise self._wrong("adversarial_fraction", repr(fraction), "a number from 0 to 1")
        return float(fraction)

    def _ask(self, method: str, answer: Callable[[], T]) -> T:
        try:
            return answer()
        except Exception as error:
            raise UsageError(
                f"schedule.method: {self._name}.{method} failed: {type(error).__name__}: {error}"
            ) from error

    def _state(self, method: str, state: Any) -> ScheduleState:
        if not isinstance(state, ScheduleState):
            raise self._wrong(method, _kind(state), "a hpc_absa.records.ScheduleState")
        for key, value in vars(state).items():
            if value is not None and not isinstance(value, int | float | str):
                raise self._wrong(
                    method, f"a state with {key} of type {_kind(value)}", "int, float, str or bool"
                )
        batch = state.global_batch
        if not isinstance(batch, int) or batch < 1 or batch % self._microbatch:
            raise self._wrong(
                method,
                f"global_batch = {batch!r}",
                f"a multiple of train.microbatch = {self._microbatch}",
            )
        if not _number(state.lr) or state.lr <= 0:
            raise self._wrong(method, f"lr = {state.lr!r}", "a finite number above 0")
        return state

    def _wrong(self, method: str, got: str, expected: str) -> UsageError:
        return UsageError(
            f"schedule.method: {self._name}.{method} returned {got}, expected {expected}"
        )


def load(
    reference: str, arguments: Mapping[str, Any], offered: Mapping[str, Any], microbatch: int
) -> OwnRule:
    """The rule that `"package.module:Class"` makes of the job.

    Args:
        reference: Of the job's `schedule.method`.
        arguments: The table's own keys; the class must take each.
        offered: What the class gets where its signature asks for it.
        microbatch: Samples b of one.

    Raises:
        UsageError: no such class, arguments that it has not, or one that makes no rule.
    """
    made = plugins.call(
        plugins.resolve(reference, "schedule.method"), "schedule", arguments, offered, reference
    )
    if not isinstance(made, Rule):
        raise UsageError(
            f"schedule.method: {reference} made {_kind(made)}, "
            "expected a subclass of hpc_absa.schedules.Rule"
        )
    rule = OwnRule(made, reference, microbatch)
    rule.initial()
    return rule


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _kind(value: Any) -> str:
    return type(value).__name__
