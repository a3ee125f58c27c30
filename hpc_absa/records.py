"""The frozen records that the stages of a run hand to each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Action = Literal["continue", "grow", "finish"]
"""What a decision asks for; `grow` is a larger global batch, and more ranks if it feeds them."""


@dataclass(frozen=True)
class Eigenvalue:
    """The top eigenvalue of the Hessian together with the evidence for it."""

    value: float
    """Largest eigenvalue by value (not by magnitude), in units of the loss per squared weight."""
    residual: float
    """`‖Hv − λv‖ / |λ|` for the unit vector v returned with it: some eigenvalue is this close."""
    matvecs: int
    """Hessian-vector products spent."""
    samples: int
    """Samples the Hessian was averaged over, all ranks together."""
    seconds: float
    converged: bool
    """Whether the estimated error met the tolerance; otherwise the value never grows a run."""
    stopped_above_threshold: bool = False
    """Ended early, unconverged: λ is above the threshold asked about, so the run does not grow."""


@dataclass(frozen=True)
class GradientSquares:
    """Squared gradient norms of one optimizer step, from which the gradient noise follows."""

    microbatches: int
    """Microbatches M of the step, all ranks together."""
    each: float
    """Mean over the microbatches of `‖gₘ‖²`, gₘ the gradient of one microbatch's mean loss."""
    mean: float
    """`‖(1/M) Σ gₘ‖²`, of the step's own gradient, before clipping and weight decay."""


@dataclass(frozen=True)
class Observation:
    """What a schedule sees at a boundary of the course (an epoch's end or a decision point)."""

    epoch: float
    """Epochs visited, at the boundary itself."""
    decision_point: bool
    """False at an epoch's end that is not a decision point."""
    eigenvalue: Eigenvalue | None = None
    """None where the schedule asked for none."""


@dataclass(frozen=True)
class ScheduleState:
    """Everything a schedule remembers; saved as the attributes of `/schedule` in a checkpoint.

    A schedule that remembers more extends this class by fields of its own, each of int, float, str,
    bool or None and with a default.
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
    """Decision points since the last growth (the patience counter)."""
    milestones_passed: int = 0


@dataclass(frozen=True)
class Decision:
    """A schedule's answer to an observation."""

    action: Action
    reason: str
    """One sentence for people, numbers included."""
    state: ScheduleState
    """The state that holds from the next step on."""


@dataclass(frozen=True)
class PhaseOutcome:
    """How a world of ranks ended its work."""

    kind: Literal["done", "resize", "stopped"]
    next_ranks: int
    """Ranks the next phase wants; the present number unless `kind` is `resize`."""
    phase: int
