"""Frozen records that the parts of a run exchange."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Action = Literal["continue", "grow", "finish"]
"""`grow` means a larger global batch, and more ranks if it has enough microbatches for them."""


@dataclass(frozen=True)
class Eigenvalue:
    """An estimate of the top eigenvalue of the Hessian, with its accuracy."""

    value: float
    """Largest eigenvalue by value (not by magnitude), in units of the loss per squared weight."""
    residual: float
    """`‖Hv − λv‖ / |λ|` for its unit vector v: some eigenvalue is this close."""
    matvecs: int
    """Hessian-vector products computed."""
    samples: int
    """Samples the Hessian was averaged over, all ranks together."""
    seconds: float
    converged: bool
    """Whether the estimated error is within the tolerance; the batch never grows otherwise."""
    stopped_above_threshold: bool = False
    """The estimate stopped early, unconverged: λ is above the schedule's threshold."""
    error: float | None = None
    """Estimated relative error of `value` as an eigenvalue of this sample's Hessian."""
    sampling_error: float | None = None
    """Standard error of `value` over the choice of the sample, in its units."""
    upper_bound: float | None = None
    """Upper confidence bound of λ over all training samples, if one was computed to compare it with
    the schedule's threshold. The batch grows only if the bound is not above the threshold."""

    @property
    def at_most(self) -> float:
        """What a threshold is compared with: `upper_bound`, or `value` if there is none."""
        return self.value if self.upper_bound is None else self.upper_bound


@dataclass(frozen=True)
class GradientSquares:
    """Squared gradient norms of one optimizer step, for the gradient noise scale."""

    microbatches: int
    """Microbatches M of the step, all ranks together."""
    each: float
    """Mean over the microbatches of `‖gₘ‖²`, gₘ the gradient of one microbatch's mean loss."""
    mean: float
    """`‖(1/M) Σ gₘ‖²`, of the step's own gradient, before clipping and weight decay."""


@dataclass(frozen=True)
class Observation:
    """The input of a schedule's decision at a boundary: an epoch's end or a decision point."""

    epoch: float
    """Epochs completed at the boundary, with a fraction."""
    decision_point: bool
    """False at an epoch's end that is not a decision point."""
    eigenvalue: Eigenvalue | None = None
    """None if the schedule did not want one."""


@dataclass(frozen=True)
class ScheduleState:
    """The whole state of a schedule, saved as the attributes of `/schedule` in a checkpoint.

    A schedule with more state extends this class by fields of type int, float, str, bool or None,
    each with a default.
    """

    global_batch: int
    """Samples of one optimizer step."""
    lr: float
    """Learning rate before warm-up and cosine."""
    adversarial_fraction: float = 0.0
    """Fraction of every microbatch replaced by adversarial examples (r in ABSA)."""
    reference: float | None = None
    """Eigenvalue that the next ones are compared with (λ_ref)."""
    patience_count: int = 0
    """Decision points since the last growth."""
    milestones_passed: int = 0


@dataclass(frozen=True)
class Decision:
    """A schedule's decision at a boundary."""

    action: Action
    reason: str
    """One sentence for the event log, with numbers."""
    state: ScheduleState
    """The state from the next step on."""
    cause: str | None = None
    """What made the batch grow: `eigenvalue`, `patience`, `schedule`, `gradients`, `random`."""


@dataclass(frozen=True)
class PhaseOutcome:
    """How a phase ended."""

    kind: Literal["done", "resize", "stopped"]
    next_ranks: int
    """Number of ranks of the next phase; the same number unless `kind` is `resize`."""
    phase: int
