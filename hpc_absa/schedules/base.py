"""What the schedules share: interface, batch sizes, learning-rate schedule, growth.

Origins named in docstrings: *talk* is the ABSA talk and arXiv:1810.01021, *Goyal* arXiv:1706.02677,
*Smith* arXiv:1711.00489, *ours* a choice of this project.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from hpc_absa.errors import UsageError
from hpc_absa.records import Decision, Eigenvalue, GradientSquares, Observation, ScheduleState
from hpc_absa.section import Fraction, NonNegative, Positive, Section, explain


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
        """If λ is above this, the next decision is the same, whatever λ is exactly.

        The estimate may stop early there. None if the value of λ is needed.
        """
        return None

    def wants_another(self, state: ScheduleState, seen: Eigenvalue, estimates: int) -> bool:
        """Whether to estimate λ once more, on other samples, before the decision.

        Args:
            state: the present state.
            seen: the mean of the estimates so far.
            estimates: how many there were at this decision point.
        """
        return False

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


LrRule = Literal["linear", "square-root", "none"]
EXPONENTS: Mapping[LrRule, float] = {"linear": 1.0, "square-root": 0.5, "none": 0.0}
"""The learning rate is proportional to this power of the batch."""


@dataclass(frozen=True)
class MultiStepLR:
    """The learning rate is multiplied by `gamma` at each milestone, in epochs."""

    milestones: tuple[int, ...]
    gamma: float

    def passed(self, epoch: float) -> int:
        return sum(milestone <= epoch for milestone in self.milestones)

    def apply(self, state: ScheduleState, seen: Observation) -> tuple[ScheduleState, str]:
        """The decayed state and a sentence about it; the same state and "" without a milestone."""
        passed = self.passed(seen.epoch)
        new = passed - state.milestones_passed
        if not new:
            return state, ""
        lr = state.lr * self.gamma**new
        where = "no milestone yet"  # where a run is continued with other milestones
        if passed:
            where = f"milestone at epoch {self.milestones[passed - 1]}"
        reason = f"{where}: learning rate {state.lr:.4g} → {lr:.4g}"
        return replace(state, lr=lr, milestones_passed=passed), reason


def whole(value: Any) -> Any:
    """A float that is an integer as an int; anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class TrainSettings(Section):
    """The training settings that schedules depend on."""

    epochs: Annotated[PositiveInt, BeforeValidator(whole)]
    """Passes over the training set; also as `1e6`, which TOML reads as a float."""
    microbatch: PositiveInt
    """Samples of one forward and backward pass on one rank; batch-norm statistics are over it."""
    lr: Positive
    """Learning rate at the base batch."""
    milestones: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()
    """Epochs after which the learning rate is decayed (GG: after which the batch grows)."""
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Factor ρ at each milestone (talk, CIFAR-10)."""
    annealing: Literal["milestones", "cosine"] = "milestones"
    """How the learning rate decays over the run: by `lr_decay` at each milestone, or along a cosine
    to zero at the last epoch (arXiv:1608.03983, without restarts)."""

    @property
    def multi_step_lr(self) -> MultiStepLR:
        return MultiStepLR(self.milestones, self.lr_decay)

    @model_validator(mode="after")
    def _check_milestones(self) -> Self:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones = {list(self.milestones)}: expected increasing epochs")
        if self.milestones and self.annealing == "cosine":
            raise ValueError(
                f"milestones = {list(self.milestones)}: expected none with annealing = 'cosine'"
            )
        return self


class Schedule(Section, Rule):
    """Base of all `[schedule]` tables. A schedule is a usable rule once `bind` has been called."""

    hessian_defaults: ClassVar[Mapping[str, Any]] = {}
    """Defaults of the `[hessian]` table that this method changes."""

    base_batch: PositiveInt
    """Global batch B0 for which `train.lr` was chosen; adaptive schedules start there. Samples."""
    max_batch: PositiveInt | None = None
    """Largest global batch, which BL and FB use throughout. Samples; None means `base_batch`."""

    _train: TrainSettings = PrivateAttr()
    _seed: int = PrivateAttr(default=0)
    _samples: int | None = PrivateAttr(default=None)

    def __init__(self, **values: Any) -> None:
        """
        Raises:
            UsageError: one line that names key, value and what was expected.
        """
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise UsageError(f"{type(self).__name__}: {explain(error, type(self))}") from None

    # As pydantic's own: tables of a job file are made without it.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @property
    def largest_batch(self) -> int:
        return self.max_batch or self.base_batch

    def check(self, train: TrainSettings) -> None:
        """Raise a ValueError if the schedule does not fit these settings."""
        for key in ("base_batch", "max_batch"):
            value = getattr(self, key)
            if value is not None and value % train.microbatch:
                raise ValueError(
                    f"schedule.{key} = {value}: expected a multiple of train.microbatch = "
                    f"{train.microbatch}"
                )

    def bind(self, train: TrainSettings, seed: int = 0, samples: int | None = None) -> Self:
        """A copy of this schedule for a run with these settings.

        Args:
            train: the training settings.
            seed: of the job.
            samples: training samples, where they are known; decisions may need them.

        Raises:
            ValueError: the schedule does not fit them.
            UsageError: a user-defined rule cannot be loaded.
        """
        self.check(train)
        bound = self.model_copy()
        bound._train, bound._seed, bound._samples = train, seed, samples
        return bound

    @model_validator(mode="after")
    def _check_batches(self) -> Self:
        if self.largest_batch < self.base_batch:
            raise ValueError(
                f"max_batch = {self.max_batch}: expected at least base_batch = {self.base_batch}"
            )
        return self


class BuiltInSchedule(Schedule):
    """Base of the built-in methods: how the learning rate follows batch and epoch."""

    lr_rule: LrRule = "linear"
    """How the learning rate follows the batch: with its ratio (`linear`: Goyal), with the root of
    the ratio (`square-root`: Krizhevsky, arXiv:1404.5997), or not at all."""
    warmup_epochs: NonNegative = 0.0
    """Epochs of linear warm-up at the start of the run (only FB has a warm-up by default)."""
    warmup_from: Fraction | None = None
    """Fraction of the learning rate at which warm-up starts; None means at `train.lr` for BL and FB
    if they scale it (Goyal), and a tenth otherwise (ours)."""

    def check(self, train: TrainSettings) -> None:
        super().check(train)
        if train.annealing == "cosine" and self.warmup_epochs >= train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs = {self.warmup_epochs:g}: expected less than train.epochs "
                f"= {train.epochs}, because the cosine begins after the warm-up"
            )

    def initial(self) -> ScheduleState:
        return ScheduleState(self.base_batch, self._train.lr)

    def lr(self, state: ScheduleState, epoch: float) -> float:
        """`state.lr` after linear warm-up and cosine annealing."""
        if epoch < self.warmup_epochs or self._train.annealing != "cosine":
            return self._warmed_up(state.lr, epoch)
        done = (epoch - self.warmup_epochs) / (self._train.epochs - self.warmup_epochs)
        return state.lr * (1 + math.cos(math.pi * min(done, 1.0))) / 2

    def unchanged(self, state: ScheduleState, epoch: float, growing: bool) -> tuple[float, float]:
        """Nothing changes before the next milestone."""
        left = self._train.milestones[state.milestones_passed :]
        return math.inf, left[0] if left else math.inf

    def _warmed_up(self, lr: float, epoch: float) -> float:
        if epoch >= self.warmup_epochs:
            return lr
        start = lr * self._warmup_start()
        return start + (lr - start) * epoch / self.warmup_epochs

    def _warmup_start(self) -> float:
        return 0.1 if self.warmup_from is None else self.warmup_from


class GrowingSchedule(BuiltInSchedule):
    """Base of the methods whose batch grows, up to the maximum, at decision points."""

    def can_grow(self, state: ScheduleState) -> bool:
        return state.global_batch < self.largest_batch

    def unchanged(self, state: ScheduleState, epoch: float, growing: bool) -> tuple[float, float]:
        points, until = super().unchanged(state, epoch, growing)
        return (
            self._points_without_growth(state, growing) if self.can_grow(state) else points
        ), until

    def _points_without_growth(self, state: ScheduleState, growing: bool) -> float:
        """The next decision points below the maximum at which the batch cannot grow."""
        return 0

    def grow(self, state: ScheduleState, batch: int) -> ScheduleState:
        """With the larger `batch`, and `lr ← lr·(B_new/B_old)^e` with e by `lr_rule`."""
        lr = state.lr * (batch / state.global_batch) ** EXPONENTS[self.lr_rule]
        return replace(state, global_batch=batch, lr=lr)

    def decide(self, state: ScheduleState, seen: Observation) -> Decision:
        """Decay at milestones, then growth; both can happen at the same boundary."""
        decayed, milestone = self._train.multi_step_lr.apply(state, seen)
        if not seen.decision_point:
            return Decision("continue", milestone or "no decision point", decayed)
        if not self.can_grow(decayed):
            at_maximum = f"batch is at its maximum {self.largest_batch}"
            return Decision("continue", milestone or at_maximum, decayed)
        decision = self._decide_growth(decayed, seen)
        reason = decision.reason
        if decision.action == "grow":
            reason += f": batch {state.global_batch} → {decision.state.global_batch}"
        return replace(decision, reason="; ".join(filter(None, [reason, milestone])))

    @abstractmethod
    def _decide_growth(self, state: ScheduleState, seen: Observation) -> Decision:
        """The decision at a decision point below the maximum; `decide` adds to its reason."""


class FactorSchedule(GrowingSchedule):
    """Base of the methods whose batch grows by the factor β."""

    beta: Annotated[int, Field(ge=2)] = 2
    """Factor by which the batch grows, at most once a decision point (talk)."""

    def next_batch(self, state: ScheduleState) -> int:
        return min(self.beta * state.global_batch, self.largest_batch)
