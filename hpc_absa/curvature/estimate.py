"""The top eigenvalue of the Hessian, as decisions need it: on a sample, to a tolerance, cheaply.

`_Search` has the steps; `docs/curvature.md` explains them.

Shapes:
    P  trainable parameters
    N  samples
    M  microbatches
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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
)
from hpc_absa.curvature.pieces import Hessians, Pieces
from hpc_absa.curvature.sampling import Scatter
from hpc_absa.records import Eigenvalue

__all__ = ["Estimate", "HessianSample", "Interrupted", "estimate_eigenvalue"]

Method = Literal["lanczos", "power"]

COARSE_TOLERANCE = 0.05
"""Of the coarse search: only its vector is used, and the sampling error is larger than this."""
COARSE_MAX_ITER = 6
COARSE_OVERLAP = 1.0
"""As `OVERLAP`, for the coarse search's own tolerance."""
COARSE_MARGIN = 2.0
"""A coarse value this many times the threshold is tested on as many other samples."""
COARSE_LEVEL = 0.05
"""Probability that this test finds λ of the whole sample above a threshold that it is below."""
LEVEL = 0.01
"""Probability that λ of all data is above its upper bound, over the choice of the sample."""
GROUPS = 16
"""Groups of samples whose scatter gives the sampling error of an upper bound: Student's t with
fewer degrees of freedom makes the bound much larger. Half as many for the coarse test."""
COARSE_NOISE = 0.1
"""Random part of the coarse search's start."""
OVERLAP = 0.03
"""Assumed of the coarse search's vector: its component along the top eigenvector is at least this
share of its component along the vector found. Then at most 1 of 200 estimates is outside the
tolerance on networks (`benchmarks/curvature.md`). Assuming nothing takes up to twice the products.
"""


@dataclass(frozen=True)
class Estimate:
    """The top eigenvalue of the Hessian of the mean loss over a sample, with its vector."""

    eigenvalue: Eigenvalue
    vector: Tensor
    """[P] float32, unit length: parameters that require grad, in `model.parameters()` order."""
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

    With `lanczos` the search begins on an eighth of the sample, from `start` or its gradient. The
    vector computed there starts the search on the whole sample.

    Args:
        model: on the device the sample loads to.
        loss_fn: `loss_fn(outputs, targets)`, a mean over the microbatch.
        sample: training samples in a fixed order; the first `samples` are used.
        comm: communicator.
        method: `lanczos` or `power`.
        samples: N, at most `sample.size`.
        microbatch: samples differentiated at a time at most; on a CPU fewer if their activations
            exceed `pieces.PIECE_BYTES`. It does not depend on the number of ranks.
        tol: relative error at which the estimate counts as converged.
        max_iter: maximum number of products with the whole sample's Hessian.
        start: [P], the vector of the previous estimate, or None.
        threshold: the caller asks whether λ of all data is at most this, and needs the value only
            if it is (`Eigenvalue.upper_bound`). A Rayleigh quotient above the threshold shows that
            it is not, because λ is never below; so does a test on part of the sample. The estimate
            then ends unconverged, with `stopped_above_threshold`.
        poll: called before each product, with the same result on all ranks; True interrupts.
        keep_samples: samples per rank whose autograd graph stays in memory between products, where
            a product costs two gradients instead of three. By default one and a half microbatches
            (an estimate then takes about twice the memory of a training step), or more as long as
            their activations are within `pieces.KEEP_BYTES`.
        reproducible: value and vector are bit for bit the same for any power-of-two number of
            ranks.

    Raises:
        Interrupted: `poll` returned True.
        ValueError: an argument is out of range.
    """
    if method not in ("lanczos", "power"):
        raise ValueError(f"method: expected 'lanczos' or 'power', got {method!r}")
    begin = time.perf_counter()
    with evaluation_mode(model):
        hessians = Hessians(
            model, loss_fn, sample, comm, samples, poll, reproducible,
            Pieces.of(model, sample, samples, microbatch, keep_samples),
        )  # fmt: skip
        found = _Search(hessians, method, tol, max_iter, threshold).run(start)
    result = found.result
    value = Eigenvalue(
        value=result.top.value,
        residual=result.top.residual,
        matvecs=result.matvecs,
        samples=found.samples,
        seconds=time.perf_counter() - begin,
        converged=result.top.converged and not result.stopped,
        stopped_above_threshold=result.stopped,
        error=result.top.error,
        sampling_error=found.sampling_error,
        upper_bound=found.upper_bound,
    )
    vector = comm.broadcast_(result.top.vector.float().contiguous())
    return Estimate(value, vector, result.lowest, found.coarse_matvecs, hessians.samples_processed)


@dataclass(frozen=True)
class _Found:
    """What a search has found."""

    result: eigen.Result
    samples: int
    coarse_matvecs: int
    sampling_error: float | None = None
    upper_bound: float | None = None


class _Search:
    """The steps of an estimate: coarse search, search on the whole sample, upper bound."""

    def __init__(
        self,
        hessians: Hessians,
        method: Method,
        tol: float,
        max_iter: int,
        threshold: float | None,
    ) -> None:
        self.hessians, self.method, self.tol = hessians, method, tol
        self.max_iter, self.threshold = max_iter, threshold
        self.coarse_matvecs = 0

    def run(self, start: Tensor | None) -> _Found:
        """Search from `start`, where it fits the model, or from the gradient."""
        samples, pieces = self.hessians.samples, self.hessians.pieces
        solver = _Solver(self.hessians.of(0, samples, pieces.whole), self.method)
        if self.method == "power" or 2 * pieces.coarse_samples > samples:
            vector, overlap = _start(solver.operator, start), None
        else:
            coarse = self._coarse(start)
            if coarse.stopped or math.isnan(coarse.top.value):
                return _Found(coarse, pieces.coarse_samples, 0)
            vector, overlap = coarse.top.vector, OVERLAP
            self.coarse_matvecs = coarse.matvecs
            solver.operator.plan = self.hessians.plan
        result = solver.solve(vector, self.tol, self.max_iter, self.threshold, overlap)
        found = self._bounded(solver, result)
        solver.operator.close()
        return found

    def _coarse(self, start: Tensor | None) -> eigen.Result:
        """Search on the coarse sample; `stopped` if λ is known to be above the threshold."""
        count = self.hessians.pieces.coarse_samples
        operator = self.hessians.of(0, count, self.hessians.pieces.coarse)
        search = eigen.Lanczos(
            operator.matvec, _start(operator, start, COARSE_NOISE), max_iter=COARSE_MAX_ITER,
            overlap=COARSE_OVERLAP, broadcast=operator.comm.broadcast_,
        )  # fmt: skip
        margin = None if self.threshold is None else COARSE_MARGIN * self.threshold
        result = search.run(COARSE_TOLERANCE, margin)
        if result.stopped and not self._above(result.top):
            result = search.run(COARSE_TOLERANCE)
        operator.close()
        return result

    def _above(self, coarse: eigen.Eigenpair) -> bool:
        """Whether λ of the whole sample is above the threshold, by a test on other samples.

        `λ ≥ vᵀHv` for the coarse vector v, and v does not depend on the samples that are not in
        the coarse sample; as many of them give the mean over the rest, with its standard error.
        """
        assert self.threshold is not None
        count, samples = self.hessians.pieces.coarse_samples, self.hessians.samples
        others = self.hessians.scatter(coarse.vector, count, 2 * count, GROUPS // 2)
        part = count / (samples - count)
        margin = others.margin(COARSE_LEVEL) * math.sqrt(max(0.0, 1 - part))
        least = others.mean - margin
        return (count * coarse.value + (samples - count) * least) / samples > self.threshold

    def _bounded(self, solver: _Solver, result: eigen.Result) -> _Found:
        """With the sampling error; and the upper bound, if λ may be below the threshold."""
        samples, scatter = self.hessians.samples, solver.scatter(result)
        if not math.isfinite(result.top.value):
            return _Found(result, samples, self.coarse_matvecs)
        upper = None
        if self.threshold is not None and result.top.converged and not result.stopped:
            if scatter.groups < GROUPS:
                scatter = self.hessians.scatter(result.top.vector, 0, samples, GROUPS)
            margin = scatter.margin(LEVEL)
            result = solver.separate(result, self.tol, self.threshold - margin)
            upper = result.top.value + abs(result.top.value) * result.top.error + margin
            if math.isclose(upper, self.threshold, rel_tol=1e-12):  # up to rounding
                upper = self.threshold
        error = scatter.standard_error if scatter.groups > 1 else None
        return _Found(result, samples, self.coarse_matvecs, error, upper)


def _start(operator: HessianOperator, previous: Tensor | None, noise: float = 1.0) -> Tensor:
    """The previous vector, where it fits the model, or the gradient; with noise."""
    if previous is not None and previous.numel() == operator.size:
        vector = previous.to(operator.device, operator.dtype)
    else:
        vector = operator.gradient()
    return eigen.randomized(vector, noise, broadcast=operator.comm.broadcast_)


class _Solver:
    """An eigensolver on one Hessian that records the products of the microbatches."""

    def __init__(self, operator: HessianOperator, method: Method) -> None:
        self.operator, self.method = operator, method
        self.lanczos: eigen.Lanczos | None = None
        self.products: list[Tensor] = []
        """[M, j] for the j-th product: `v_iᵀ ∇²L_m v_j` of this rank's microbatches m, i ≤ j; with
        `power` [M, 1]."""

    def solve(
        self,
        start: Tensor,
        tol: float,
        max_iter: int,
        threshold: float | None,
        overlap: float | None = None,
    ) -> eigen.Result:
        """Search from `start`; a Ritz value above `threshold` ends the search."""
        broadcast = self.operator.comm.broadcast_
        if self.method == "power":
            return eigen.power(
                self._matvec, start, tol=tol, max_iter=max_iter, threshold=threshold,
                broadcast=broadcast,
            )  # fmt: skip
        self.lanczos = eigen.Lanczos(
            self._matvec, start, max_iter=max_iter, overlap=overlap, broadcast=broadcast
        )
        return self.lanczos.run(tol, threshold)

    def separate(self, result: eigen.Result, tol: float, limit: float) -> eigen.Result:
        """Continue until λ is known to be at most `limit`, or cannot be."""
        return result if self.lanczos is None else self.lanczos.separate(tol, limit)

    def _matvec(self, vector: Tensor) -> Tensor:
        vectors = vector[None]
        if self.lanczos is not None:
            vectors = self.lanczos.basis[: self.lanczos.steps + 1]
        products = torch.zeros(len(self.operator.bounds), len(vectors), dtype=torch.float64)

        def record(index: int, product: Tensor) -> None:
            products[index] = eigen.dots(vectors, product)

        image = self.operator.matvec(vector, record)
        self.products.append(products)
        return image

    def scatter(self, result: eigen.Result) -> Scatter:
        """`yᵀ ∇²L_m y` of all microbatches for `y = Σ c_j v_j`, the vector found."""
        weights = torch.tensor(self.operator.weights, dtype=torch.float64)
        c = result.coefficients
        values = torch.zeros(len(weights), dtype=torch.float64)
        for j, products in enumerate(self.products[len(self.products) - len(c) :]):
            factors = 2 * c[: j + 1] * c[j]  # v_jᵀ ∇²L_m v_i for i ≤ j
            factors[j] /= 2
            values += products @ factors
        return Scatter(self.operator.comm.allreduce_(values), weights)
