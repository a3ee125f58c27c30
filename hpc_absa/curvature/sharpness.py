"""Critical sharpness: curvature along the next update, from forward passes (arXiv:2601.16979).

With the update `θ − η·Δ`, the critical learning rate η_c is the smallest one at which the loss
increases, and `λ_c = 2/η_c`. For a quadratic loss with Hessian H and `Δ = ∇L` it is
`ΔᵀHΔ / ‖Δ‖²`: the top eigenvalue where Δ points along its eigenvector, and less elsewhere.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hpc_absa.comm import Communicator
from hpc_absa.curvature.estimate import Estimate, Interrupted
from hpc_absa.curvature.operator import HessianOperator, HessianSample, Loss, evaluation_mode
from hpc_absa.records import Eigenvalue

FACTOR = 2.0
"""Between the first two learning rates of the search; it is multiplied by itself at each pass."""


def critical_sharpness(
    model: nn.Module,
    loss_fn: Loss,
    sample: HessianSample,
    comm: Communicator,
    direction: Callable[[Tensor], Tensor],
    *,
    samples: int,
    microbatch: int,
    tol: float,
    max_iter: int,
    guess: float,
    threshold: float | None = None,
    poll: Callable[[], bool] | None = None,
    reproducible: bool = False,
) -> Estimate:
    """The critical sharpness on the first `samples` samples, the same on all ranks.

    A collective. The model is evaluated in evaluation mode and left bit for bit as it was. From
    `guess`, learning rates are multiplied or divided by 2, 4, 8, … until the critical one is
    between two of them, and that interval is then bisected in the logarithm.

    Args:
        model: on the device the sample loads to.
        loss_fn: as for `HessianOperator`.
        sample: training samples in a fixed order.
        comm: communicator.
        direction: the update Δ [P] at learning rate one, for the gradient [P] of the sample.
        samples: the first of `sample` that are used.
        microbatch: samples of one forward pass.
        tol: relative width of the interval at which the value counts as converged.
        max_iter: maximum number of forward passes over the sample, after the first one.
        guess: learning rate to begin with, positive.
        threshold: a value above it is not refined (`stopped_above_threshold`).
        poll: called before each pass, with the same result on all ranks; True interrupts.
        reproducible: as for `HessianOperator`.

    Returns:
        An estimate whose `eigenvalue` is λ_c, the geometric mean of the interval, with forward
        passes as `matvecs` and half the interval's relative width as `residual`.

    Raises:
        Interrupted: `poll` returned True.
    """
    begin = time.perf_counter()
    passes = 0
    with evaluation_mode(model):
        operator = HessianOperator(
            model, loss_fn, sample, comm, samples=samples, microbatch=microbatch,
            keep_graphs=0, reproducible=reproducible,
        )  # fmt: skip
        update = direction(operator.gradient())
        start = operator.loss()

        def change(lr: float) -> float:
            """Of the loss; infinite where the loss is not finite."""
            nonlocal passes
            if poll is not None and poll():
                raise Interrupted
            passes += 1
            loss = operator.loss(update * -lr)
            return loss - start if math.isfinite(loss) else math.inf

        low, high = _bracket(change, guess, max_iter)
        while low > 0 and high < math.inf and high / low > 1 + tol and passes < max_iter:
            if threshold is not None and 2 / high > threshold:
                break
            middle = math.sqrt(low * high)
            low, high = (low, middle) if change(middle) > 0 else (middle, high)
    bounded = low > 0 and high < math.inf
    stopped = bounded and threshold is not None and 2 / high > threshold
    middle = math.sqrt(low * high) if bounded else math.nan
    value = 2 / (high if stopped else middle)
    width = (high - low) / middle
    eigenvalue = Eigenvalue(
        value=value,
        residual=width / 2,
        matvecs=passes,
        samples=samples,
        seconds=time.perf_counter() - begin,
        converged=bounded and high / low <= 1 + tol and not stopped,
        stopped_above_threshold=stopped,
        error=width / 2,
    )
    vector = comm.broadcast_((update / torch.linalg.vector_norm(update)).float().contiguous())
    return Estimate(eigenvalue, vector, math.nan, 0, (passes + 2) * samples)


def _bracket(change: Callable[[float], float], guess: float, max_iter: int) -> tuple[float, float]:
    """Learning rates at which the loss decreases and increases; 0 and infinity if unknown."""
    low, high, factor, lr = 0.0, math.inf, FACTOR, guess
    for _ in range(max_iter):
        changed = change(lr)
        if changed > 0:
            high, lr = lr, lr / factor
        elif changed < 0:
            low, lr = lr, lr * factor
        elif high < math.inf:
            break  # it increases as soon as it changes at all
        else:
            lr *= factor  # the step is below the rounding of the weights
        if low > 0 and high < math.inf:
            break
        factor *= FACTOR
    return low, high
