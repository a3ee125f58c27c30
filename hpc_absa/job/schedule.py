"""The `[schedule]` table of a job file, one model a method.

Origins named below: *talk* is the ABSA talk and arXiv:1810.01021, *Goyal* arXiv:1706.02677, *Smith*
arXiv:1711.00489.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from hpc_absa.job.base import Fraction, Positive, Section


class _Schedule(Section):
    """What all schedules have."""

    base_batch: PositiveInt
    """Global batch B0 for which `train.lr` was chosen; adaptive schedules start there. Samples."""
    max_batch: PositiveInt | None = None
    """Largest global batch, which BL and FB use throughout. Samples; None means `base_batch`."""

    @property
    def largest_batch(self) -> int:
        """`max_batch` with its default filled in."""
        return self.max_batch or self.base_batch

    @model_validator(mode="after")
    def _room_to_grow(self) -> _Schedule:
        if self.largest_batch < self.base_batch:
            raise ValueError(
                f"max_batch = {self.max_batch}: expected at least base_batch = {self.base_batch}"
            )
        return self


class Baseline(_Schedule):
    """BL: constant batch, learning rate as given, decayed at milestones."""

    method: Literal["bl"]
    """`bl`."""


class FacebookRule(_Schedule):
    """FB: constant batch, learning rate scaled with it after a warm-up (Goyal)."""

    method: Literal["fb"]
    """`fb`."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 5
    """Epochs of linear warm-up from `lr` to `lr · B/B0` (Goyal, section 2.2)."""


class GoogleRule(_Schedule):
    """GG: the batch grows by 1/ρ at each milestone instead of the learning rate's decay (Smith)."""

    method: Literal["gg"]
    """`gg`."""


class AdaptiveBatch(_Schedule):
    """ABS: the batch grows when the top Hessian eigenvalue has fallen."""

    method: Literal["abs"]
    """`abs`."""
    alpha: Annotated[float, Field(gt=1)] = 2.0
    """Growth needs an eigenvalue at most `reference / alpha` (talk)."""
    beta: Annotated[int, Field(ge=2)] = 2
    """Factor by which batch and learning rate grow (talk)."""
    kappa: PositiveInt = 10
    """Decision points without growth after which the batch grows all the same (talk)."""


class AdversarialAdaptiveBatch(AdaptiveBatch):
    """ABSA: ABS with adversarial examples in every microbatch."""

    method: Literal["absa"]  # type: ignore[assignment]
    """`absa`."""
    ratio: Fraction = 0.2
    """Fraction r of a microbatch that becomes adversarial (talk)."""
    epsilon: Positive = 0.005
    """Step of the fast gradient sign method; pixel units, inputs in [0, 1] (talk)."""
    omega: Annotated[float, Field(ge=1)] = 2.0
    """Divisor of `ratio` at each growth (talk)."""


Schedule = Annotated[
    Baseline | FacebookRule | GoogleRule | AdaptiveBatch | AdversarialAdaptiveBatch,
    Field(discriminator="method"),
]

SCHEDULES: dict[str, type[_Schedule]] = {
    "bl": Baseline,
    "fb": FacebookRule,
    "gg": GoogleRule,
    "abs": AdaptiveBatch,
    "absa": AdversarialAdaptiveBatch,
}
"""By what `method` says."""
