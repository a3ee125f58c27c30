"""The job's `[schedule]` as a rule."""

from __future__ import annotations

from hpc_absa import config
from hpc_absa.config import Job
from hpc_absa.schedules.absa import AdaptiveBatch, Adversarial
from hpc_absa.schedules.fixed import Constant
from hpc_absa.schedules.noise import NoiseScale
from hpc_absa.schedules.own import load
from hpc_absa.schedules.rule import EXPONENTS, Growth, Milestones, Rate, Rule
from hpc_absa.schedules.smith import GoogleRule

TENTH = 0.1
"""Fraction of the learning rate that a warm-up starts from where nothing was scaled (ours)."""


def build(job: Job) -> Rule:
    """The rule that the job's `[schedule]` names.

    Raises:
        UsageError: a rule of the user's own that cannot be loaded.
    """
    schedule, train = job.schedule, job.train
    milestones = Milestones(train.milestones, train.lr_decay)
    base, largest = schedule.base_batch, schedule.largest_batch
    if isinstance(schedule, config.OwnRule):
        offered = {
            "base_batch": base,
            "max_batch": largest,
            "microbatch": train.microbatch,
            "lr": train.lr,
            "milestones": milestones,
            "epochs": train.epochs,
        }
        return load(schedule.method, schedule.arguments, offered, train.microbatch)
    exponent = EXPONENTS[schedule.lr_rule]
    growth = Growth(getattr(schedule, "beta", 1), largest, exponent)
    match schedule:
        case config.Baseline():
            lr = train.lr * (largest / base) ** exponent
            scaled = schedule.lr_rule != "none"
            return Constant(largest, lr, milestones, _rate(job, train.lr / lr if scaled else TENTH))
        case config.GoogleRule():
            return GoogleRule(
                base, largest, train.microbatch, train.lr, milestones, exponent, _rate(job)
            )
        case config.NoiseScale():
            gamma, b = schedule.gamma, train.microbatch
            return NoiseScale(base, train.lr, growth, gamma, b, milestones, _rate(job))
        case config.AdaptiveBatch():
            return AdaptiveBatch(
                base,
                train.lr,
                growth,
                schedule.alpha,
                schedule.kappa,
                milestones,
                schedule.estimate_every,
                Adversarial(schedule.ratio, schedule.omega, train.epochs / 2)
                if isinstance(schedule, config.AdversarialAdaptiveBatch)
                else None,
                _rate(job),
            )


def _rate(job: Job, start: float = TENTH) -> Rate:
    """Warm-up and cosine of the job; a warm-up begins at `start` unless the job says otherwise."""
    train, schedule = job.train, job.schedule
    assert not isinstance(schedule, config.OwnRule)
    cosine = float(train.epochs) if train.annealing == "cosine" else None
    if not schedule.warmup_epochs:
        return Rate(cosine_until=cosine)
    given = schedule.warmup_from
    return Rate(schedule.warmup_epochs, start if given is None else given, cosine)
