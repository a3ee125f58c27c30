"""Schedules of global batch and learning rate: pure functions of measurements, one class a method.

The class of a method is both its `[schedule]` table and, once bound to a run's settings, its rule.
"""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from pydantic import Discriminator, Tag

from hpc_absa.schedules.absa import ABS, ABSA, ABSATuned
from hpc_absa.schedules.base import MultiStepLR, Rule, Schedule, TrainSettings
from hpc_absa.schedules.controls import RandomGrowth
from hpc_absa.schedules.fixed import BL, FB, GG, Seesaw
from hpc_absa.schedules.noise import GNS, NormTest
from hpc_absa.schedules.steps import Steps
from hpc_absa.schedules.user_defined import UserDefined

__all__ = [
    "ABS",
    "ABSA",
    "BL",
    "FB",
    "GG",
    "GNS",
    "SCHEDULES",
    "USER_DEFINED",
    "ABSATuned",
    "AnySchedule",
    "Milestones",
    "MultiStepLR",
    "NormTest",
    "RandomGrowth",
    "Rule",
    "Schedule",
    "Seesaw",
    "Steps",
    "TrainSettings",
    "UserDefined",
    "build",
    "class_of",
]

Milestones = MultiStepLR
"""The former name, which user-defined rules may import."""

USER_DEFINED = "package.module:Class"
"""The form of `method` for a user-defined rule."""


def _tag(value: Any) -> str | None:
    """The key in `SCHEDULES` of a `[schedule]` table or of an instance."""
    method = value.get("method") if isinstance(value, dict) else getattr(value, "method", None)
    if method is None:
        return None
    return USER_DEFINED if ":" in str(method) else str(method)


AnySchedule = Annotated[
    Annotated[BL, Tag("bl")]
    | Annotated[FB, Tag("fb")]
    | Annotated[GG, Tag("gg")]
    | Annotated[ABS, Tag("abs")]
    | Annotated[ABSA, Tag("absa")]
    | Annotated[ABSATuned, Tag("absa-tuned")]
    | Annotated[GNS, Tag("gns")]
    | Annotated[NormTest, Tag("norm-test")]
    | Annotated[Seesaw, Tag("seesaw")]
    | Annotated[Steps, Tag("steps")]
    | Annotated[RandomGrowth, Tag("random")]
    | Annotated[UserDefined, Tag(USER_DEFINED)],
    Discriminator(_tag),
]
"""A `[schedule]` table, read by the class that its `method` names."""

SCHEDULES: dict[str, type[Schedule]] = {
    method.model_fields["method"].default: method
    for method in (BL, FB, GG, ABS, ABSA, ABSATuned, GNS, NormTest, Seesaw, Steps, RandomGrowth)
}
SCHEDULES[USER_DEFINED] = UserDefined
"""Classes by `method`."""


def class_of(value: Any) -> type[Schedule] | None:
    """The class of a `[schedule]` table or of an instance; None if there is none."""
    return SCHEDULES.get(str(_tag(value)))


class _Job(Protocol):
    """The parts of `hpc_absa.config.Job` that a rule depends on."""

    @property
    def schedule(self) -> Schedule: ...
    @property
    def train(self) -> TrainSettings: ...
    @property
    def seed(self) -> int: ...


def build(job: _Job, samples: int | None = None) -> Rule:
    """The rule of the job's `[schedule]` table, for so many training samples.

    Raises:
        UsageError: a user-defined rule cannot be loaded.
    """
    return job.schedule.bind(job.train, job.seed, samples)
