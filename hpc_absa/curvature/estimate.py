"""The top eigenvalue of the Hessian, as decisions need it: on a sample, to a tolerance, cheaply.

Shapes:
    P  trainable parameters
    N  samples
    M  microbatches
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpc_absa.comm import Communicator
from hpc_absa.curvature import eigen
from hpc_absa.curvature.operator import (
    HessianOperator,
    HessianSample,
    Interrupted,
    Loss,
    evaluation_mode,
    uses_batch_statistics,
)
from hpc_absa.records import Eigenvalue

__all__ = ["Estimate", "HessianSample", "Interrupted", "estimate_eigenvalue"]

Method = Literal["lanczos", "power"]

CPU_MICROBATCH = 64
"""Samples: a CPU takes 10 % less time for a product by 64 than by 128 (`docs/curvature.md`)."""
COARSE_FRACTION = 8
"""The search starts on this part of the sample, where a product costs as much less."""
COARSE_SAMPLES = 16
"""The smallest coarse sample: the Hessian of fewer differs too much from the whole sample's."""
COARSE_TOLERANCE = 0.05
"""Of the coarse search: only its vector is used, and the sampling error is larger than this."""
COARSE_MAX_ITER = 6
COARSE_MARGIN = 2.0
"""A coarse value this many times the threshold is above it: on 16 to 64 samples the eigenvalue is
1.0 to 1.5 times the whole sample's (`docs/curvature.md`)."""
NOISE = 0.01
"""Share of noise in a start vector. It costs at most its square, 1e-4, in the eigenvalue."""


@dataclass(frozen=True)
class Estimate:
    """The top eigenvalue of the Hessian of the mean loss over a sample, with its vector."""

    eigenvalue: Eigenvalue
    vector: Tensor
    """[P] float32, unit length: parameters that require grad, in `model.parameters()` order."""
    error: float
    """Estimated relative error of the value as an eigenvalue of this sample's Hessian."""
    sampling_error: float
    """Standard error of the value over the choice of the sample, from the scatter of the
    microbatches, absolute; NaN with fewer than two microbatches."""
    lowest: float
    """Smallest Ritz value; a negative one proves a direction of negative curvature."""
    coarse_matvecs: int
    """Products with the Hessian of the coarse sample, on top of `eigenvalue.matvecs`."""
    samples_processed: int
    """Samples differentiated, once for a gradient and twice for a product. Divided by
    `eigenvalue.samples` it is the cost in gradients of the sample."""


def estimate_eigenvalue(
    model: nn.Module,
    loss_fn: Loss,
    sample: HessianSample,
    comm: Communicator,
    *,
    method: Method,
    samples: int,
    microbatch: int,
    tol: float,
    max_iter: int,
    start: Tensor | None = None,
    threshold: float | None = None,
    poll: Callable[[], bool] | None = None,
    keep_samples: int | None = None,
    reproducible: bool = False,
) -> Estimate:
    """The top eigenvalue of `∇²(1/N Σ loss)` at the model's parameters, the same on all ranks.

    A collective, with equal arguments and data on all ranks. The model is evaluated in evaluation
    mode and left bit for bit as it was.

    With `lanczos` the search begins on an eighth of the sample, from its gradient and `start`. The
    vector found there starts the search on the whole sample, which then takes two or three
    products.

    Args:
        model: on the device the sample loads to.
        loss_fn: `loss_fn(outputs, targets)`, a mean over the microbatch.
        sample: training samples in a fixed order; the first `samples` are used.
        comm: communicator.
        method: `lanczos` or `power`.
        samples: N, at most `sample.size`.
        microbatch: samples differentiated at a time at most; on a CPU at most `CPU_MICROBATCH`,
            which fits its caches better. It does not depend on the number of ranks.
        tol: relative error at which the estimate counts as converged.
        max_iter: maximum number of products with the whole sample's Hessian.
        start: [P], the vector of the previous estimate, or None.
        threshold: the caller only needs to know whether λ > threshold. A Rayleigh quotient above it
            proves that, as it is never above λ; a coarse value above `COARSE_MARGIN` times the
            threshold is accepted as well. The estimate then ends unconverged, with
            `eigenvalue.stopped_above_threshold`.
        poll: called before each product, with the same result on all ranks; True interrupts.
        keep_samples: samples per rank whose autograd graph stays in memory between products, where
            a product costs two gradients instead of three. By default one and a half microbatches:
            an estimate then takes about twice the memory of a training step.
        reproducible: value and vector are bit for bit the same for any power-of-two number of
            ranks.

    Raises:
        Interrupted: `poll` returned True.
        ValueError: an argument is out of range.
    """
    if method not in ("lanczos", "power"):
        raise ValueError(f"method: expected 'lanczos' or 'power', got {method!r}")
    begin = time.perf_counter()
    keep_samples = 3 * microbatch // 2 if keep_samples is None else keep_samples
    coarse_samples = max(COARSE_SAMPLES, samples // COARSE_FRACTION)
    batch_statistics = uses_batch_statistics(model)
    if batch_statistics:  # the Hessian then depends on the microbatch: it is that of training
        coarse_samples = max(coarse_samples, microbatch)
    coarse_microbatch = min(microbatch, coarse_samples)
    if next(model.parameters()).device.type == "cpu" and not batch_statistics:
        microbatch = min(microbatch, CPU_MICROBATCH)
        coarse_microbatch = min(coarse_microbatch, COARSE_SAMPLES)

    def solver(samples: int, microbatch: int) -> _Solver:
        operator = HessianOperator(
            model, loss_fn, sample, comm, samples=samples, microbatch=microbatch, poll=poll,
            keep_graphs=max(1, keep_samples // max(microbatch, 1)), reproducible=reproducible,
        )  # fmt: skip
        return _Solver(operator, method)

    with evaluation_mode(model):
        used = solver(samples, microbatch)
        processed = coarse_matvecs = 0
        result: eigen.Result | None = None
        if method == "lanczos" and 2 * coarse_samples <= samples:
            coarse = solver(coarse_samples, coarse_microbatch)
            limit = None if threshold is None else COARSE_MARGIN * threshold
            starts = coarse.starts(start)
            result = coarse.solve(starts, COARSE_TOLERANCE, COARSE_MAX_ITER, limit)
            coarse.operator.close()
            used.operator.plan = coarse.operator.plan
            if result.stopped or math.isnan(result.top.value):
                used = coarse
            else:
                processed, coarse_matvecs = coarse.operator.samples_processed, result.matvecs
                result = used.solve([result.top.vector], tol, max_iter, threshold)
        if result is None:
            result = used.solve(used.starts(start), tol, max_iter, threshold)
        sampling_error = used.sampling_error(result)
    top = result.top
    value = Eigenvalue(
        value=top.value,
        residual=top.residual,
        matvecs=result.matvecs,
        samples=used.operator.samples,
        seconds=time.perf_counter() - begin,
        converged=top.converged and not result.stopped,
        stopped_above_threshold=result.stopped,
    )
    return Estimate(
        value,
        comm.broadcast_(top.vector.float().contiguous()),
        top.error,
        sampling_error,
        result.lowest,
        coarse_matvecs,
        processed + used.operator.samples_processed,
    )


class _Solver:
    """An eigensolver on one Hessian that records the products of the microbatches."""

    def __init__(self, operator: HessianOperator, method: Method) -> None:
        self.operator, self.method = operator, method
        self.vectors: list[Tensor] = []
        """v_1 … v_j, the vectors multiplied so far; with `power` the last one only."""
        self.products: list[Tensor] = []
        """[M, number of vectors] for each v_j: `v_iᵀ ∇²L_m v_j` of this rank's microbatches m."""

    def starts(self, previous: Tensor | None) -> list[Tensor]:
        """The previous vector, where it fits the model, and the gradient."""
        operator = self.operator
        starts = []
        if previous is not None and previous.numel() == operator.size:
            starts.append(previous.to(operator.device, operator.dtype))
        return [*starts, operator.gradient()]

    def solve(
        self, starts: Sequence[Tensor], tol: float, max_iter: int, threshold: float | None
    ) -> eigen.Result:
        """Search from `starts`; a Ritz value above `threshold` ends the search."""
        stop = None if threshold is None else (lambda value: value > threshold)
        starts, broadcast = self._noisy(starts), self.operator.comm.broadcast_
        limits: dict[str, Any] = {"tol": tol, "max_iter": max_iter, "stop": stop}
        if self.method == "power":
            return eigen.power(self._matvec, starts[0], broadcast=broadcast, **limits)
        return eigen.lanczos(self._matvec, starts, broadcast=broadcast, **limits)

    def _noisy(self, starts: Sequence[Tensor]) -> list[Tensor]:
        """Unit vectors with a little noise, the same on all ranks.

        The noise keeps a start from being orthogonal to the top eigenvector by symmetry, and
        replaces starts that are all zero or not finite.
        """
        operator = self.operator
        # Made on the device; broadcast, because a GPU's random numbers depend on its model.
        generator = torch.Generator(operator.device).manual_seed(0)
        noise = torch.randn(
            operator.size, generator=generator, dtype=operator.dtype, device=operator.device
        )
        noise = operator.comm.broadcast_(noise)
        noise = noise / torch.linalg.vector_norm(noise)
        lengths = [torch.linalg.vector_norm(vector) for vector in starts]
        return [
            vector / length + NOISE * noise
            for vector, length in zip(starts, lengths, strict=True)
            if math.isfinite(length) and length > 0
        ] or [noise]

    def _matvec(self, vector: Tensor) -> Tensor:
        self.vectors = [*self.vectors, vector] if self.method == "lanczos" else [vector]
        products = torch.zeros(len(self.operator.weights), len(self.vectors), dtype=torch.float64)

        def record(index: int, product: Tensor) -> None:
            for column, other in enumerate(self.vectors):
                products[index, column] = float(other @ product)

        image = self.operator.matvec(vector, record)
        self.products.append(products)
        return image

    def sampling_error(self, result: eigen.Result) -> float:
        """Standard error of `yᵀ H y` for `y = Σ c_j v_j`, from `yᵀ ∇²L_m y` of all microbatches."""
        weights = torch.tensor(self.operator.weights, dtype=torch.float64)
        c = result.coefficients
        m, count = len(c), len(weights)
        if count < 2 or not 0 < m <= len(self.products):
            return math.nan
        values = torch.zeros(count, dtype=torch.float64)
        for j, products in enumerate(self.products[-m:]):  # v_jᵀ ∇²L_m v_i for i ≤ j
            factors = 2 * c[: j + 1] * c[j]
            factors[j] /= 2
            values += products[:, -(j + 1) :] @ factors
        values = self.operator.comm.allreduce_(values)
        variance = (weights**2 * (values - weights @ values) ** 2).sum() * count / (count - 1)
        return float(variance.sqrt())
