"""The estimate of curvature that a job asks for, as `Run` calls it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from hpc_absa.comm import Communicator
from hpc_absa.config import Job
from hpc_absa.curvature.estimate import Estimate, estimate_eigenvalue
from hpc_absa.curvature.loss import Loss
from hpc_absa.curvature.sharpness import critical_sharpness
from hpc_absa.training.data import Draw, HessianSample
from hpc_absa.training.state import TrainState
from hpc_absa.training.virtual_step import update_direction

Estimator = Callable[[Tensor | None, float | None, Callable[[], bool], Draw], Estimate]
"""Estimates the top eigenvalue of the Hessian (a collective).

Args: the eigenvector to start from, [P] or None; the threshold that the decision compares with, or
None; a function that tells, equally on all ranks, whether to give up by raising `Interrupted`; the
samples.
"""


def make_estimator(
    job: Job,
    state: TrainState,
    loss: Loss,
    comm: Communicator,
    sample_of: Callable[[Draw], HessianSample],
) -> Estimator:
    """By `job.hessian.method`, of the model in `state`, on the samples that `sample_of` gives."""

    def estimator(
        start: Tensor | None, threshold: float | None, poll: Callable[[], bool], draw: Draw
    ) -> Estimate:
        sample = sample_of(draw)
        settings: dict[str, Any] = {
            "samples": sample.size,
            "microbatch": job.train.microbatch,
            "tol": job.hessian.tol,
            "max_iter": job.hessian.max_iter,
            "threshold": threshold,
            "poll": poll,
            "reproducible": job.train.reproducible,
        }
        if job.hessian.method == "sharpness":
            last = state.progress.eigenvalue
            usable = last is not None and math.isfinite(last) and last > 0
            settings["guess"] = 2 / last if last is not None and usable else job.train.lr
            direction = partial(
                update_direction, state.model, state.optimizer,
                max_grad_norm=job.train.max_grad_norm,
            )  # fmt: skip
            return critical_sharpness(state.model, loss, sample, comm, direction, **settings)
        settings["false_growth"] = 0.5 if sample.whole else job.hessian.false_growth
        settings["start"] = None if job.hessian.fresh else start
        settings["candidates"] = sample.candidates
        return estimate_eigenvalue(
            state.model, loss, sample, comm, method=job.hessian.method, **settings
        )

    return estimator
