"""The top eigenvalue of the Hessian, as decisions need it: on a sample, to a tolerance, cheaply.

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
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hpc_absa.comm import Communicator
from hpc_absa.curvature import eigen, fast
from hpc_absa.curvature.operator import (
    HessianOperator,
    HessianSample,
    Interrupted,
    Loss,
    evaluation_mode,
    trainable_parameters,
    uses_batch_statistics,
)
from hpc_absa.records import Eigenvalue

__all__ = ["Estimate", "HessianSample", "Interrupted", "estimate_eigenvalue"]

Method = Literal["lanczos", "power"]

PIECE_BYTES = 128 << 20
"""Activations of the samples that a CPU differentiates at a time: 64 for a ResNet-20, where a
product takes 10 % less time than by 128 (`benchmarks/curvature.md`); a perceptron's whole batch."""
KEEP_BYTES = 64 << 20
"""Activations whose graphs are always kept; a graph takes some four times as much."""
COARSE_FRACTION = 8
"""The search starts on this part of the sample, where a product costs as much less."""
COARSE_SAMPLES = 16
"""The smallest coarse sample: the Hessian of fewer differs too much from the whole sample's."""
COARSE_TOLERANCE = 0.05
"""Of the coarse search: only its vector is used, and the sampling error is larger than this."""
COARSE_MAX_ITER = 6
COARSE_OVERLAP = 1.0
"""As `OVERLAP`, for the coarse search's own tolerance."""
COARSE_MARGIN = 2.0
"""A coarse value this many times the threshold is above it: on 16 to 64 samples the eigenvalue is
1.0 to 1.5 times the whole sample's (`docs/curvature.md`)."""
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
            exceed `PIECE_BYTES`. It does not depend on the number of ranks.
        tol: relative error at which the estimate counts as converged.
        max_iter: maximum number of products with the whole sample's Hessian.
        start: [P], the vector of the previous estimate, or None.
        threshold: the caller only needs to know whether λ > threshold. A Rayleigh quotient above it
            proves that, as it is never above λ; a coarse value above `COARSE_MARGIN` times the
            threshold is accepted as well. The estimate then ends unconverged, with
            `eigenvalue.stopped_above_threshold`. A value below the threshold converges only if its
            upper bound is below, too.
        poll: called before each product, with the same result on all ranks; True interrupts.
        keep_samples: samples per rank whose autograd graph stays in memory between products, where
            a product costs two gradients instead of three. By default one and a half microbatches
            (an estimate then takes about twice the memory of a training step), or more as long as
            their activations are within `KEEP_BYTES`.
        reproducible: value and vector are bit for bit the same for any power-of-two number of
            ranks.

    Raises:
        Interrupted: `poll` returned True.
        ValueError: an argument is out of range.
    """
    if method not in ("lanczos", "power"):
        raise ValueError(f"method: expected 'lanczos' or 'power', got {method!r}")
    begin = time.perf_counter()
    coarse_samples = max(COARSE_SAMPLES, samples // COARSE_FRACTION)
    batch_statistics = uses_batch_statistics(model)
    if batch_statistics:  # the Hessian then depends on the microbatch: it is that of training
        coarse_samples = max(coarse_samples, microbatch)

    def solver(samples: int, microbatch: int) -> _Solver:
        operator = HessianOperator(
            model, loss_fn, sample, comm, samples=samples, microbatch=microbatch, poll=poll,
            keep_graphs=max(1, kept_samples // max(microbatch, 1)), reproducible=reproducible,
        )  # fmt: skip
        return _Solver(operator, method)

    with evaluation_mode(model):
        sample_bytes = activation_bytes(model, sample, microbatch)
        kept_samples = max(3 * microbatch // 2, KEEP_BYTES // sample_bytes)
        if keep_samples is not None:
            kept_samples = keep_samples
        coarse_microbatch = min(microbatch, coarse_samples)
        if next(model.parameters()).device.type == "cpu" and not batch_statistics:
            piece = max(1, PIECE_BYTES // sample_bytes)
            microbatch = min(microbatch, piece)
            coarse_microbatch = min(coarse_microbatch, max(COARSE_SAMPLES, piece // 4))
        used = solver(samples, microbatch)
        processed = coarse_matvecs = 0
        result: eigen.Result | None = None
        if method == "lanczos" and 2 * coarse_samples <= samples:
            coarse = solver(coarse_samples, coarse_microbatch)
            result = coarse.solve(
                coarse.start(start, COARSE_NOISE), COARSE_TOLERANCE, COARSE_MAX_ITER,
                None if threshold is None else COARSE_MARGIN * threshold, COARSE_OVERLAP,
            )  # fmt: skip
            coarse.operator.close()
            used.operator.plan = coarse.operator.plan
            if result.stopped or math.isnan(result.top.value):
                used = coarse
            else:
                processed, coarse_matvecs = coarse.operator.samples_processed, result.matvecs
                result = used.solve(result.top.vector, tol, max_iter, threshold, OVERLAP)
        if result is None:
            result = used.solve(used.start(start), tol, max_iter, threshold)
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
        sampling_error=sampling_error if math.isfinite(sampling_error) else None,
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


_ACTIVATION_BYTES: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def activation_bytes(model: nn.Module, sample: HessianSample, microbatch: int) -> int:
    """Bytes that autograd saves per sample in a forward pass, without the parameters'.

    Measured once for each model, on a microbatch as training has it.
    """
    if model not in _ACTIVATION_BYTES:
        count = max(1, min(microbatch, sample.size))
        leaves = {n: fast.leaf(p, fast.PLAIN) for n, p in trainable_parameters(model).items()}
        fixed = {t.untyped_storage().data_ptr() for t in (*leaves.values(), *model.parameters())}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = fast.forward(model, sample.load(0, count)[0], leaves, fast.PLAIN)
        del outputs
        total = sum(size for storage, size in saved.items() if storage not in fixed)
        _ACTIVATION_BYTES[model] = max(1, total // count)
    return _ACTIVATION_BYTES[model]


class _Solver:
    """An eigensolver on one Hessian that records the products of the microbatches."""

    def __init__(self, operator: HessianOperator, method: Method) -> None:
        self.operator, self.method = operator, method
        self.vectors: list[Tensor] = []
        """v_1 … v_j, the vectors multiplied so far; with `power` the last one only."""
        self.products: list[Tensor] = []
        """[M, number of vectors] for each v_j: `v_iᵀ ∇²L_m v_j` of this rank's microbatches m."""

    def start(self, previous: Tensor | None, noise: float = 1.0) -> Tensor:
        """The previous vector, where it fits the model, or the gradient; with noise."""
        operator = self.operator
        if previous is not None and previous.numel() == operator.size:
            vector = previous.to(operator.device, operator.dtype)
        else:
            vector = operator.gradient()
        return eigen.randomized(vector, noise, broadcast=operator.comm.broadcast_)

    def solve(
        self,
        start: Tensor,
        tol: float,
        max_iter: int,
        threshold: float | None,
        overlap: float | None = None,
    ) -> eigen.Result:
        """Search from `start`; a Ritz value above `threshold` ends the search."""
        limits: dict[str, Any] = {
            "tol": tol, "max_iter": max_iter, "threshold": threshold,
            "broadcast": self.operator.comm.broadcast_,
        }  # fmt: skip
        if self.method == "power":
            return eigen.power(self._matvec, start, **limits)
        return eigen.lanczos(self._matvec, start, overlap=overlap, **limits)

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
