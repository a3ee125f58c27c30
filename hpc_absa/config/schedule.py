"""The `[schedule]` table of a job file, one model a method.

Origins named below: *talk* is the ABSA talk and arXiv:1810.01021, *Goyal* arXiv:1706.02677, *Smith*
arXiv:1711.00489.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, PositiveInt, Tag, model_validator

from hpc_absa.config.base import Fraction, Positive, Section

LrRule = Literal["linear", "square-root", "none"]

OWN = "package.module:Class"
"""What `method` looks like for a rule of the user's own."""


class _Batches(Section):
    """What all schedules have, the user's own too."""

    base_batch: PositiveInt
    """Global batch B0 for which `train.lr` was chosen; adaptive schedules start there. Samples."""
    max_batch: PositiveInt | None = None
    """Largest global batch, which BL and FB use throughout. Samples; None means `base_batch`."""

    @property
    def largest_batch(self) -> int:
        """`max_batch` with its default filled in."""
        return self.max_batch or self.base_batch

    @model_validator(mode="after")
    def _room_to_grow(self) -> _Batches:
        if self.largest_batch < self.base_batch:
            raise ValueError(
                f"max_batch = {self.max_batch}: expected at least base_batch = {self.base_batch}"
            )
        return self


class _Schedule(_Batches):
    """What all schedules of ours have."""

    lr_rule: LrRule = "linear"
    """How the learning rate follows the batch: with its ratio (`linear`: Goyal), with the root of
    the ratio (`square-root`: Krizhevsky, arXiv:1404.5997), or not at all."""
    warmup_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Epochs of linear warm-up at the start of the run (only FB has one of itself)."""
    warmup_from: Fraction | None = None
    """Fraction of the learning rate that warm-up starts from; None means from `train.lr` where the
    constant batch's rate is scaled (Goyal), and a tenth otherwise (ours)."""


class Baseline(_Schedule):
    """BL: constant batch, learning rate as given, decayed at milestones."""

    method: Literal["bl"]
    """`bl`."""
    lr_rule: LrRule = "none"
    """As for all; BL keeps `train.lr` whatever the batch is (talk)."""


class FacebookRule(Baseline):
    """FB: constant batch, learning rate scaled with it after a warm-up (Goyal)."""

    method: Literal["fb"]  # type: ignore[assignment]
    """`fb`."""
    lr_rule: LrRule = "linear"
    """As for all (Goyal, section 2.1)."""
    warmup_epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5.0
    """Epochs of linear warm-up from `lr` to `lr · B/B0` (Goyal, section 2.2)."""


class GoogleRule(_Schedule):
    """GG: the batch grows by 1/ρ at each milestone instead of the learning rate's decay (Smith)."""

    method: Literal["gg"]
    """`gg`."""
    lr_rule: LrRule = "none"
    """As for all; growth stands for a decay, so the learning rate stays (Smith)."""


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
    estimate_every: PositiveInt = 1
    """Decision points from one estimate to the next before the first growth; at those between, only
    patience can grow the batch."""


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


class TunedAdversarialAdaptiveBatch(AdversarialAdaptiveBatch):
    """ABSA tuned: ABSA that decides on less and less often early on, and is sooner out of patience.

    Of what the talk says of its tuned run (last row of the time table) no number is published;
    these are ours. `HESSIAN` has the preset's share of the `[hessian]` table.
    """

    method: Literal["absa-tuned"]  # type: ignore[assignment]
    """`absa-tuned`."""
    kappa: PositiveInt = 5
    """As in ABSA; half of its patience, so that growth comes early."""
    estimate_every: PositiveInt = 2
    """As in ABSA; every other decision point before the first growth."""


HESSIAN: dict[str, dict[str, Any]] = {"absa-tuned": {"samples": 128, "tol": 0.1}}
"""Defaults of `[hessian]` that a method has of its own: λ/2 is told from λ by far less precision
than the talk's 1e-2, and by the smallest sample it names."""


class NoiseScale(_Schedule):
    """GNS: the batch grows up to the gradient noise scale (arXiv:1812.06162)."""

    method: Literal["gns"]
    """`gns`."""
    beta: Annotated[int, Field(ge=2)] = 2
    """Factor by which the batch grows, at most once a decision point."""
    gamma: Positive = 1.0
    """Noise scales that the batch may reach: at one, a step does the work of half as many samples
    as it takes (arXiv:1812.06162, section 2.2)."""


class OwnRule(_Batches):
    """A rule of the user's own. Other keys go to its class as arguments."""

    # The table of `Named`: strict, frozen, and open.
    model_config = ConfigDict(extra="allow")

    method: str
    """`package.module:Class`, a subclass of `hpc_absa.schedules.Rule`."""
    epsilon: Positive = 0.005
    """As in ABSA, where the rule's state has an `adversarial_fraction`."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The keys beyond this table's own fields."""
        return dict(self.model_extra or {})


def _tag(value: Any) -> str | None:
    """Which model a `[schedule]` table is read by."""
    method = value.get("method") if isinstance(value, dict) else getattr(value, "method", None)
    if method is None:
        return None
    return OWN if ":" in str(method) else str(method)


Schedule = Annotated[
    Annotated[Baseline, Tag("bl")]
    | Annotated[FacebookRule, Tag("fb")]
    | Annotated[GoogleRule, Tag("gg")]
    | Annotated[AdaptiveBatch, Tag("abs")]
    | Annotated[AdversarialAdaptiveBatch, Tag("absa")]
    | Annotated[TunedAdversarialAdaptiveBatch, Tag("absa-tuned")]
    | Annotated[NoiseScale, Tag("gns")]
    | Annotated[OwnRule, Tag(OWN)],
    Discriminator(_tag),
]

SCHEDULES: dict[str, type[_Batches]] = {
    "bl": Baseline,
    "fb": FacebookRule,
    "gg": GoogleRule,
    "abs": AdaptiveBatch,
    "absa": AdversarialAdaptiveBatch,
    "absa-tuned": TunedAdversarialAdaptiveBatch,
    "gns": NoiseScale,
    OWN: OwnRule,
}
"""By what `method` says."""
