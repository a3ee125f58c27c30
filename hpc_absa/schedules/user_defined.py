"""User-defined rules, `schedule.method = "package.module:Class"`, with checks of their answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Self

from pydantic import PrivateAttr

from hpc_absa import plugins
from hpc_absa.errors import MisuseError, UsageError
from hpc_absa.records import Decision, ScheduleState
from hpc_absa.schedules.base import Rule, Schedule, TrainSettings
from hpc_absa.section import OpenSection, Positive


def _checked(method: str, convert: Callable[[Any], Any] = lambda answer: answer) -> Any:
    """A method that calls the user's method of this name and checks its answer."""

    def checked(self: UserDefined, *arguments: Any) -> Any:
        return convert(self._call(method, *arguments))

    return checked


def _with_cause(decision: Decision) -> Decision:
    if decision.action == "grow" and decision.cause is None:
        return replace(decision, cause="user-defined")
    return decision


class UserDefined(Schedule, OpenSection):
    """A user-defined rule. Other keys are arguments of its class.

    `bind` also passes `base_batch`, `max_batch`, `microbatch`, `lr`, `milestones`, `epochs` and
    `seed` to a class that has parameters of these names. Every method raises a MisuseError, one
    line that names it, if the user's method fails or returns something invalid.
    """

    method: str
    """`package.module:Class`, a subclass of `hpc_absa.schedules.Rule`."""
    epsilon: Positive = 0.005
    """As in ABSA, for a rule whose state has an `adversarial_fraction`."""

    _rule: Rule = PrivateAttr()

    def bind(self, train: TrainSettings, seed: int = 0, samples: int | None = None) -> Self:
        bound = super().bind(train, seed, samples)
        offered = {
            "base_batch": self.base_batch,
            "max_batch": self.largest_batch,
            "microbatch": train.microbatch,
            "lr": train.lr,
            "milestones": train.multi_step_lr,
            "epochs": train.epochs,
            "seed": seed,
        }
        target = plugins.resolve(self.method, "schedule.method")
        rule = plugins.call(target, "schedule", self.arguments, offered, self.method)
        if not isinstance(rule, Rule):
            raise UsageError(
                f"schedule.method: {self.method} made {_kind(rule)}, "
                "expected a subclass of hpc_absa.schedules.Rule"
            )
        bound._rule = rule
        bound.initial()
        return bound

    initial = _checked("initial")
    decide = _checked("decide", _with_cause)
    wants_eigenvalue = _checked("wants_eigenvalue", bool)
    threshold = _checked("threshold")
    wants_another = _checked("wants_another", bool)
    wants_gradients = _checked("wants_gradients", bool)
    learn = _checked("learn")
    evidence = _checked("evidence")
    recall = _checked("recall")
    unchanged = _checked("unchanged", tuple)
    after_unchanged = _checked("after_unchanged")
    lr = _checked("lr", float)
    adversarial_fraction = _checked("adversarial_fraction", float)

    def _call(self, method: str, *arguments: Any) -> Any:
        place = f"schedule.method: {self.method}.{method}"
        try:
            answer = getattr(self._rule, method)(*arguments)
        except Exception as error:
            raise MisuseError(f"{place} failed: {type(error).__name__}: {error}") from error
        match method:
            case "initial" | "learn" | "recall" | "after_unchanged":
                problem = self._state_problem(answer)
            case "decide":
                problem = self._decision_problem(arguments[0], answer)
            case "lr" if not _is_number(answer) or answer < 0:
                problem = repr(answer), "a finite learning rate, 0 or more"
            case "adversarial_fraction" if not _is_number(answer) or not 0 <= answer <= 1:
                problem = repr(answer), "a number from 0 to 1"
            case _:
                problem = None
        if problem:
            raise MisuseError(f"{place} returned {problem[0]}, expected {problem[1]}")
        return answer

    def _decision_problem(self, state: ScheduleState, decision: Any) -> tuple[str, str] | None:
        """What was returned and what was expected, if `decision` is invalid in `state`."""
        if not isinstance(decision, Decision):
            return _kind(decision), "a hpc_absa.records.Decision"
        if decision.action not in ("continue", "grow"):
            return f"action {decision.action!r}", "'continue' or 'grow'"
        cause: Any = decision.cause
        if not isinstance(cause, str | None):
            return f"a cause of type {_kind(cause)}", "a str"
        if problem := self._state_problem(decision.state):
            return problem
        before, after = state.global_batch, decision.state.global_batch
        if (decision.action == "grow") != (after > before) or after < before:
            expected = "'grow' with a larger batch, or 'continue' with the same"
            return f"{decision.action!r} with batch {before} → {after}", expected
        return None

    def _state_problem(self, state: Any) -> tuple[str, str] | None:
        if not isinstance(state, ScheduleState):
            return _kind(state), "a hpc_absa.records.ScheduleState"
        for key, value in vars(state).items():
            if value is not None and not isinstance(value, int | float | str):
                return f"a state with {key} of type {_kind(value)}", "int, float, str or bool"
        batch, microbatch = state.global_batch, self._train.microbatch
        if not isinstance(batch, int) or batch < 1 or batch % microbatch:
            return f"global_batch = {batch!r}", f"a multiple of train.microbatch = {microbatch}"
        if not _is_number(state.lr) or state.lr <= 0:
            return f"lr = {state.lr!r}", "a finite number above 0"
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _kind(value: Any) -> str:
    return type(value).__name__
