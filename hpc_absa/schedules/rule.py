"""What every schedule is: a start, a decision, and a learning rate between decisions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from hpc_absa.records import Decision, Observation, ScheduleState

if TYPE_CHECKING:
    from hpc_absa.job import Job


class Rule(Protocol):
    """A schedule. Its methods are pure: same arguments, same answer, no clock, no tensors."""

    def initial(self) -> ScheduleState:
        """The state before the first step."""
        ...

    def wants_eigenvalue(self, state: ScheduleState) -> bool:
        """Whether the next decision needs an estimate; asked before each decision point."""
        ...

    def threshold(self, state: ScheduleState) -> float | None:
        """Eigenvalue above which the next decision is `continue` however far above; None: any."""
        ...

    def decide(self, state: ScheduleState, seen: Observation) -> Decision:
        """What to do at a boundary, with the state that holds from there on."""
        ...

    def lr(self, state: ScheduleState, epoch: float) -> float:
        """Learning rate of a step that begins `epoch` epochs into the run."""
        ...


@dataclass(frozen=True)
class Milestones:
    """Learning-rate decay at given epochs, common to the talk's schedules."""

    epochs: tuple[int, ...]
    decay: float
    """Factor ρ at each milestone."""

    def passed(self, epoch: float) -> int:
        """How many milestones lie at or before `epoch`."""
        return sum(1 for milestone in self.epochs if milestone <= epoch)

    def apply(self, state: ScheduleState, seen: Observation) -> tuple[ScheduleState, str]:
        """Decay for the milestones passed since the last boundary; with a sentence, or none."""
        passed = self.passed(seen.epoch)
        new = passed - state.milestones_passed
        if not new:
            return state, ""
        lr = state.lr * self.decay**new
        return (
            replace(state, lr=lr, milestones_passed=passed),
            f"milestone at epoch {self.epochs[passed - 1]}: learning rate "
            f"{state.lr:.4g} → {lr:.4g}",
        )


def build(job: Job) -> Rule:
    """The rule that the job's `[schedule]` names."""
    from hpc_absa import job as jobs
    from hpc_absa.schedules import absa, fixed, smith

    schedule, train = job.schedule, job.train
    milestones = Milestones(train.milestones, train.lr_decay)
    match schedule:
        case jobs.Baseline():
            return fixed.Baseline(schedule.largest_batch, train.lr, milestones)
        case jobs.FacebookRule():
            return fixed.FacebookRule(
                schedule.largest_batch,
                train.lr,
                milestones,
                schedule.base_batch,
                schedule.warmup_epochs,
            )
        case jobs.GoogleRule():
            return smith.GoogleRule(
                schedule.base_batch, schedule.largest_batch, train.microbatch, train.lr, milestones
            )
        case jobs.AdaptiveBatch():
            adversarial = (
                absa.Adversarial(schedule.ratio, schedule.omega, train.epochs / 2)
                if isinstance(schedule, jobs.AdversarialAdaptiveBatch)
                else None
            )
            return absa.AdaptiveBatch(
                schedule.base_batch,
                schedule.largest_batch,
                train.lr,
                schedule.alpha,
                schedule.beta,
                schedule.kappa,
                milestones,
                adversarial,
            )
