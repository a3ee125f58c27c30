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
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from hpc_absa.comm import Communicator
from hpc_absa.curvature import eigen
from hpc_absa.curvature.directional import sample_curvatures
from hpc_absa.curvature.operator import (
    HessianOperator,
    HessianSample,
    Interrupted,
    Loss,
    evaluation_mode,
    uses_batch_statistics,
)
from hpc_absa.curvature.pieces import Hessians, Pieces
from hpc_absa.curvature.power import power
from hpc_absa.curvature.sampling import Scatter, Stratum, stratified_scatter, student_t
from hpc_absa.curvature.stratified import SMALLEST, Candidates, candidate_losses, stratify
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
COARSE_LEVEL = 0.1
"""Probability that a test on part of the sample finds λ of the whole sample above a threshold that
it is below."""
FALSE_GROWTH = 1e-3
"""Probability that λ of all data is above its upper bound, over the choice of the sample. On
networks none of 1,080 answers at 0.9 λ let the batch grow, and 3 of those on random samples
(`benchmarks/curvature.md`)."""
GROUPS = 16
"""Groups of samples whose scatter gives the sampling error where that of single samples is not
known: Student's t with fewer degrees of freedom makes the bound larger. Half as many for tests on a
part of the sample."""
COARSE_NOISE = 0.1
"""Random part of the start, without which symmetry can hide the top eigenvector."""
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
    false_growth: float = FALSE_GROWTH,
    poll: Callable[[], bool] | None = None,
    keep_samples: int | None = None,
    reproducible: bool = False,
    candidates: Candidates | None = None,
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
        microbatch: samples differentiated at a time; on a CPU fewer if their activations exceed
            `pieces.PIECE_BYTES`, more if they are below `pieces.SMALL_BYTES`.
        tol: relative error at which the estimate counts as converged.
        max_iter: maximum number of products with the whole sample's Hessian.
        start: [P], the vector of the previous estimate, or None.
        threshold: the caller asks whether λ of all data is at most this, and needs the value only
            if it is (`Eigenvalue.upper_bound`). A Rayleigh quotient above the threshold shows that
            it is not; so does a test on part of the sample. The estimate then ends unconverged,
            with `stopped_above_threshold`.
        false_growth: probability that λ of all data is above its upper bound, over the choice of
            the sample; 0.5 for no bound: the value itself is compared.
        poll: called before each product, with the same result on all ranks; True interrupts.
        keep_samples: samples per rank whose autograd graph stays in memory between products, where
            a product costs two gradients instead of three. By default one and a half microbatches
            (an estimate then takes about twice the memory of a training step), or more as long as
            their activations are within `pieces.KEEP_BYTES`.
        reproducible: value and vector are bit for bit the same for any power-of-two number of
            ranks.
        candidates: more training samples, drawn at random. `lanczos` then computes the value and
            its bound on a sample of them that is stratified by loss, where the loss and the
            curvature of single samples are known (not with `false_growth = 0.5`).

    Raises:
        Interrupted: `poll` returned True.
        ValueError: an argument is out of range.
    """
    if method not in ("lanczos", "power"):
        raise ValueError(f"method: expected 'lanczos' or 'power', got {method!r}")
    begin = time.perf_counter()
    with evaluation_mode(model, tol):
        hessians = Hessians(
            model, loss_fn, sample, comm, samples, poll, reproducible,
            Pieces.of(model, sample, comm, samples, microbatch, keep_samples, reproducible),
        )  # fmt: skip
        search = _Search(hessians, method, tol, max_iter, threshold, false_growth, candidates)
        found = search.run(start)
    result = found.result
    value = Eigenvalue(
        value=result.top.value,
        residual=result.top.residual,
        matvecs=found.random_matvecs + result.matvecs,
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
    random_matvecs: int = 0
    """Products with the random sample's Hessian, before those of `result`."""
    sampling_error: float | None = None
    upper_bound: float | None = None


class _Search:
    """The steps of an estimate: coarse search, search on the whole sample, upper bound; the last
    two on a stratified sample where one can be chosen.
    """

    def __init__(
        self,
        hessians: Hessians,
        method: Method,
        tol: float,
        max_iter: int,
        threshold: float | None,
        false_growth: float,
        candidates: Candidates | None,
    ) -> None:
        self.hessians, self.method, self.tol = hessians, method, tol
        self.max_iter, self.threshold, self.false_growth = max_iter, threshold, false_growth
        self.candidates = candidates
        self.coarse_matvecs = self.random_matvecs = 0

    def run(self, start: Tensor | None) -> _Found:
        """Search from `start`, where it fits the model, or from the gradient."""
        samples, pieces = self.hessians.samples, self.hessians.pieces
        operator = self.hessians.of(0, samples, pieces.whole)
        if self.method == "power":
            result = power(
                operator.matvec, _start(operator, start), tol=self.tol, max_iter=self.max_iter,
                threshold=self.threshold, broadcast=operator.comm.broadcast_,
            )  # fmt: skip
            return self._of_random(result, None)
        if start is not None and (above := self._still_above(start)):
            return above
        overlap: float | None = None
        if not pieces.coarse_samples:
            vector, overlap = _start(operator, start, COARSE_NOISE), OVERLAP
        elif 2 * pieces.coarse_samples > samples:
            vector = _start(operator, start)
        else:
            coarse = self._coarse(start)
            if coarse.stopped:
                return _Found(coarse, pieces.coarse_samples, 0)
            if math.isnan(coarse.top.value):  # as where none of these samples has a target
                vector = _start(operator, start)
            else:
                vector, overlap = coarse.top.vector, OVERLAP
            self.coarse_matvecs = coarse.matvecs
        lanczos = self._lanczos(operator, vector, overlap)
        if self._stratifies():
            # Along a vector of other samples: λ of this one is larger than that of all data.
            if self.threshold is not None:
                first = lanczos.run(math.inf, self.threshold)
                if first.stopped or math.isnan(first.top.value):
                    return self._found(first)
            operator.close()
            if strata := self._strata(vector):
                self.random_matvecs = lanczos.steps
                del lanczos  # its basis is as large as that of the next search
                if found := self._on_stratified(*strata, vector):
                    return found
                lanczos = self._lanczos(operator, vector, overlap)
        found = self._of_random(lanczos.run(self.tol, self.threshold), lanczos)
        operator.close()
        return found

    def _lanczos(
        self, operator: HessianOperator, vector: Tensor, overlap: float | None
    ) -> eigen.Lanczos:
        return eigen.Lanczos(
            operator.matvec, vector, max_iter=self.max_iter, overlap=overlap,
            broadcast=operator.comm.broadcast_,
        )  # fmt: skip

    def _stratifies(self) -> bool:
        """Whether the value is that of a stratified sample."""
        samples, candidates = self.hessians.samples, self.candidates
        if candidates is None or candidates.size <= samples or samples < 2 * SMALLEST:
            return False
        # batch statistics of a stratum differ from those of a microbatch
        return self.false_growth < 0.5 and not uses_batch_statistics(self.hessians.model)

    def _strata(self, vector: Tensor) -> tuple[HessianSample, list[Stratum]] | None:
        """A sample of the candidates, stratified by loss.

        None, on all ranks, if losses or curvatures of single samples are not known.
        """
        hessians, candidates = self.hessians, self.candidates
        assert candidates is not None
        if sample_curvatures(hessians.of(0, 2, 2, keep=False), vector) is None:
            return None
        losses = candidate_losses(hessians.candidates(candidates))
        if losses is None:
            return None
        chosen, strata = stratify(losses, hessians.samples)
        return candidates.chosen(chosen), strata

    def _on_stratified(
        self, sample: HessianSample, strata: list[Stratum], vector: Tensor
    ) -> _Found | None:
        """Search on a stratified sample, from `vector` and the sample's gradient.

        None, on all ranks, if the curvature of a single sample is not known.
        """
        candidates = self.candidates
        assert candidates is not None
        operator = self.hessians.stratified(sample, strata)
        broadcast = operator.comm.broadcast_
        gradient = operator.gradient()
        length = eigen.norm(gradient, broadcast)
        if math.isfinite(length) and length > 0:
            vector = vector / eigen.norm(vector, broadcast) + gradient / length
        start = eigen.randomized(vector, COARSE_NOISE, broadcast=broadcast)
        lanczos = self._lanczos(operator, start, OVERLAP)
        result = lanczos.run(self.tol, self.threshold)
        found: _Found | None = self._found(result)
        if self._wants_bound(result):
            each = sample_curvatures(operator, result.top.vector, result.top.value)
            found = None
            if each is not None:
                scatter = stratified_scatter(each, strata, candidates.size, candidates.population)
                found = self._bounded(result, lanczos, scatter)
        operator.close()
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
        if result.stopped:
            least = self._above(result.top)
            if least is None:
                result = search.run(COARSE_TOLERANCE)
            else:
                result = replace(result, pairs=(replace(result.top, value=least),))
        operator.close()
        return result

    def _still_above(self, previous: Tensor) -> _Found | None:
        """As `_above`, by the vector of the previous estimate on the coarse sample itself."""
        hessians, count = self.hessians, self.hessians.pieces.coarse_samples
        if self.threshold is None or hessians.pieces.small_kernels:
            return None
        if previous.numel() != hessians.size:
            return None
        least, mean, image = self._least(previous, 0)
        if not (math.isfinite(least) and least > self.threshold):
            return None
        broadcast = hessians.comm.broadcast_
        rest = eigen.relative(eigen.norm(image - mean * previous.to(image), broadcast), mean)
        pair = eigen.Eigenpair(least, previous, rest, rest, False)
        return _Found(eigen.Result((pair,), 1, mean, True), count, 0)

    def _above(self, coarse: eigen.Eigenpair) -> float | None:
        """A lower bound of λ, by a test on other samples, if it is above the threshold.

        `λ ≥ vᵀHv` for the coarse vector v, and v does not depend on the samples that are not in
        the coarse sample; as many of them give the mean over the rest, with its standard error.
        The bound is of λ of all data if the value is to be that of a stratified sample, otherwise
        of λ of the whole sample.
        """
        assert self.threshold is not None
        if self.hessians.pieces.small_kernels:
            return None
        count, samples = self.hessians.pieces.coarse_samples, self.hessians.samples
        least = self._least(coarse.vector, count)[0]
        if not self._stratifies():
            least = (count * coarse.value + (samples - count) * least) / samples
        return least if least > self.threshold else None

    def _least(self, vector: Tensor, start: int) -> tuple[float, float, Tensor]:
        """A lower bound of `vᵀHv` of all samples from `start` on, by the first of them.

        Also returns `vᵀHv` and Hv of these.
        """
        count, samples = self.hessians.pieces.coarse_samples, self.hessians.samples
        scatter, image = self.hessians.scatter(vector, start, start + count, GROUPS // 2)
        part = min(1.0, count / (samples - start))
        quantile = student_t(COARSE_LEVEL, scatter.freedom)
        margin = quantile * scatter.standard_error * math.sqrt(1 - part)
        return scatter.mean - margin, scatter.mean, image

    def _scatter(self, top: eigen.Eigenpair) -> Scatter:
        """Of `vᵀHv` over the samples, or groups of them; v is the top eigenvector."""
        hessians, samples = self.hessians, self.hessians.samples
        operator = hessians.of(0, samples, hessians.pieces.whole, keep=False)
        each = sample_curvatures(operator, top.vector, top.value)
        if each is None:
            return hessians.scatter(top.vector, 0, samples, GROUPS)[0]
        return Scatter.of_groups(each, torch.full_like(each, 1 / samples))

    def _found(self, result: eigen.Result) -> _Found:
        samples = self.hessians.samples
        return _Found(result, samples, self.coarse_matvecs, self.random_matvecs)

    def _wants_bound(self, result: eigen.Result) -> bool:
        """λ may be below the threshold."""
        bounded = self.threshold is not None and self.false_growth < 0.5
        return bounded and not result.stopped and result.top.converged

    def _of_random(self, result: eigen.Result, lanczos: eigen.Lanczos | None) -> _Found:
        """Of the random sample, with the upper bound if it is wanted."""
        if not self._wants_bound(result):
            return self._found(result)
        return self._bounded(result, lanczos, self._scatter(result.top))

    def _bounded(
        self, result: eigen.Result, lanczos: eigen.Lanczos | None, scatter: Scatter
    ) -> _Found:
        """With the upper bound."""
        margin = scatter.margin(self.false_growth)
        if not math.isfinite(margin):  # one group of samples shows nothing
            return self._found(replace(result, pairs=(replace(result.top, converged=False),)))
        assert self.threshold is not None
        if lanczos is not None:
            result = lanczos.separate(self.tol, self.threshold - margin)
        upper = result.top.value + abs(result.top.value) * result.top.error + margin
        if math.isclose(upper, self.threshold, rel_tol=1e-12):  # up to rounding
            upper = self.threshold
        error = scatter.standard_error
        return replace(self._found(result), sampling_error=error, upper_bound=upper)


def _start(operator: HessianOperator, previous: Tensor | None, noise: float = 1.0) -> Tensor:
    """The previous vector, where it fits the model, or the gradient; with noise."""
    if previous is not None and previous.numel() == operator.size:
        vector = previous.to(operator.device, operator.dtype)
    else:
        vector = operator.gradient()
    return eigen.randomized(vector, noise, broadcast=operator.comm.broadcast_)
