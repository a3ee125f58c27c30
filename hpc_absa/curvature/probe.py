"""The estimate that decisions rest on: on how much data, how long, how sure."""

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
from hpc_absa.curvature.operator import HessianOperator, HessianSample, Interrupted, Loss
from hpc_absa.curvature.state import observed
from hpc_absa.records import Eigenvalue

__all__ = ["Estimate", "HessianSample", "Interrupted", "estimate"]

Method = Literal["lanczos", "power"]


@dataclass(frozen=True)
class Estimate:
    """The top eigenvalue of the Hessian of the mean loss over a sample, with its vector."""

    eigenvalue: Eigenvalue
    vector: Tensor
    """[P] float32, unit length: parameters that require grad, in `model.parameters()` order."""
    error: float = math.nan
    """Estimated relative error of the value as an eigenvalue of this sample's Hessian."""
    sampling_error: float = math.nan
    """Standard error of the value for being of a sample, from the microbatches' scatter, absolute;
    NaN with fewer than two microbatches."""
    lowest: float = math.nan
    """Smallest Ritz value seen; negative proves a direction of negative curvature."""
    stopped_above_threshold: bool = False
    """Ended early because the value is above `threshold`, which no more products would change."""
    coarse_matvecs: int = 0
    """Products with the Hessian of the coarse sample, on top of `eigenvalue.matvecs`."""
    samples_processed: int = 0
    """Samples differentiated, once for a gradient and twice for each product: cost in gradients of
    the whole sample is this over `eigenvalue.samples`."""


PIECE = 64
"""Samples: a CPU takes 10 % less time for a product by 64 than by 128 (`docs/curvature.md`)."""
COARSENESS = 8
"""The search starts on this fraction of the sample, where a product costs as much less."""
COARSE_LEAST = 16
"""Samples below which a coarse Hessian is no guide any more."""
COARSE_TOLERANCE = 0.05
"""Of the coarse search: only its direction matters, the sample's own error is larger than this."""
COARSE_ITERATIONS = 6
NOISE = 0.01
"""Share of noise in a start: its square, 1e-4, is what it can cost in the value."""
CERTAIN = 2.0
"""A coarse value this much above the threshold settles the question: of 16 to 64 samples it lies
1.0 to 1.5 times above the whole sample's (`docs/curvature.md`)."""


def estimate(
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

    All ranks call it together with equal arguments (`sample` holding the same data). The model is
    looked at in evaluation mode and left bit for bit as it was.

    With `lanczos` the search begins on the first eighth of the sample, from its gradient and
    `start`, and what it finds there starts the search on the whole sample, which then takes two or
    three products.

    Args:
        model: on the device the sample loads to.
        loss_fn: `loss_fn(outputs, targets)`, a mean over the microbatch.
        sample: training samples in a fixed order; the first `samples` are used.
        comm: the world.
        method: `lanczos`, or `power` as in the talk.
        samples: N, at most `sample.size`.
        microbatch: samples differentiated at a time at most; on a CPU pieces of `PIECE` fit its
            caches better. Pieces are the same whatever the number of ranks.
        tol: relative error at which the estimate counts as converged.
        max_iter: Hessian-vector products with the whole sample at most.
        start: [P], the previous estimate's vector, or None.
        threshold: the caller only asks whether λ ≤ threshold. A Rayleigh quotient above it answers
            that (it never exceeds λ), and so does a coarse value far above it (`CERTAIN`): the
            estimate ends there, unconverged, `stopped_above_threshold`.
        poll: asked between products, with the same answer on all ranks.
        keep_samples: samples per rank whose graph stays in memory from product to product, where a
            product costs two gradients and not three. By default one and a half microbatches, with
            which an estimate takes about twice the memory of a training step.
        reproducible: value and vector bit for bit the same at any power-of-two world size.

    Raises:
        Interrupted: `poll` answered True.
        ValueError: an argument out of range.
    """
    if method not in ("lanczos", "power"):
        raise ValueError(f"method: expected 'lanczos' or 'power', got {method!r}")
    begin = time.perf_counter()
    coarse = max(COARSE_LEAST, samples // COARSENESS)
    cascade = method == "lanczos" and 2 * coarse <= samples

    keep = 3 * microbatch // 2 if keep_samples is None else keep_samples
    piece = min(microbatch, coarse)
    if next(model.parameters()).device.type == "cpu":
        microbatch, piece = min(microbatch, PIECE), min(piece, COARSE_LEAST)

    def search(count: int, size: int) -> _Search:
        kept = max(1, keep // max(size, 1))
        operator = HessianOperator(
            model, loss_fn, sample, comm, samples=count, microbatch=size, poll=poll, kept=kept,
            reproducible=reproducible,
        )  # fmt: skip
        return _Search(operator)

    with observed(model):
        last = search(samples, microbatch)
        spent = coarse_matvecs = 0
        found: eigen.Result | None = None
        if cascade:
            first = search(coarse, piece)
            limit = None if threshold is None else CERTAIN * threshold
            found = first.run(method, start, COARSE_TOLERANCE, COARSE_ITERATIONS, limit)
            spent, coarse_matvecs = first.samples_processed, found.matvecs
            last.guess = found.top.vector
            first.operator.close()
        if found is not None and (found.stopped or math.isnan(found.top.value)):
            last, samples, result = first, coarse, found
            coarse_matvecs = 0
        else:
            result = last.run(method, start, tol, max_iter, threshold)
            spent += last.samples_processed
        spread = last.sampling_error(result)
    top = result.top
    value = Eigenvalue(
        value=top.value,
        residual=top.residual,
        matvecs=result.matvecs,
        samples=samples,
        seconds=time.perf_counter() - begin,
        converged=top.converged and not result.stopped,
        stopped_above_threshold=result.stopped,
    )
    vector = comm.broadcast_(top.vector.float().contiguous())
    return Estimate(
        value, vector, top.error, spread, result.lowest, result.stopped, coarse_matvecs, spent
    )


class _Search:
    """One estimate under way: products, their microbatches' shares, the world's agreement."""

    def __init__(self, operator: HessianOperator) -> None:
        self.operator, self.agree = operator, operator.agree
        self.guess: Tensor | None = None
        self.gradients = 0
        self.basis = True
        """Whether the vectors multiplied are the basis the result is a combination of."""
        self.vectors: list[Tensor] = []
        self.parts: list[Tensor] = []

    @property
    def samples_processed(self) -> int:
        """See `Estimate`."""
        return (self.gradients + 2 * self.operator.matvecs) * self.operator.samples

    def run(
        self,
        method: Method,
        start: Tensor | None,
        tol: float,
        max_iter: int,
        threshold: float | None,
    ) -> eigen.Result:
        """Search the sample's Hessian from what is known of its top eigenvector."""
        stop = None if threshold is None else (lambda value: value > threshold)
        starts = self._starts(start)
        if method == "power":
            self.basis = False
            return eigen.power(
                self.matvec, starts[0], tol=tol, max_iter=max_iter, agree=self.agree, stop=stop
            )
        return eigen.lanczos(
            self.matvec, starts, tol=tol, max_iter=max_iter, agree=self.agree, stop=stop
        )

    def _starts(self, previous: Tensor | None) -> list[Tensor]:
        """The coarse search's vector if there is one, else the previous one and the gradient.

        A little noise keeps a start from missing the top eigenvector by symmetry, and stands in for
        gradient and vector where both are zero or not finite.
        """
        if self.guess is not None:
            guesses = [self.guess]
        else:
            self.gradients += 1
            guesses = [*self._previous(previous), self.operator.gradient()]
        noise = _unit(self._noise())
        usable = [_unit(guess) for guess in guesses if _usable(guess)]
        return [guess + NOISE * noise for guess in usable] or [noise]

    def matvec(self, vector: Tensor) -> Tensor:
        self.vectors = [*self.vectors, vector] if self.basis else [vector]
        image, parts = self.operator.matvec(vector, self.vectors)
        self.parts.append(parts)
        return image

    def sampling_error(self, result: eigen.Result) -> float:
        """Standard error of `yᵀHy` from its values over the microbatches, all ranks' together."""
        count, m = self.operator.microbatches, len(result.combination)
        if count < 2 or not 0 < m <= len(self.parts):
            return math.nan
        own = torch.zeros(count, dtype=torch.float64)
        for j, part in enumerate(self.parts[-m:]):  # uᵀ H_m v of v_j against v_0 … v_j
            weights = 2 * result.combination[: j + 1] * result.combination[j]
            weights[j] /= 2
            own += part[:, -(j + 1) :] @ weights
        own = self.operator.comm.allreduce_(own)
        share = torch.full((count,), float(self.operator.microbatch), dtype=torch.float64)
        share[-1] = self.operator.samples - self.operator.microbatch * (count - 1)
        share /= self.operator.samples
        variance = (share**2 * (own - share @ own) ** 2).sum() * count / (count - 1)
        return float(variance.sqrt())

    def _previous(self, start: Tensor | None) -> list[Tensor]:
        if start is None or start.numel() != self.operator.size:
            return []
        return [start.to(device=self.operator.device, dtype=self.operator.dtype)]

    def _noise(self) -> Tensor:
        """Standard normal [P], made on the device; rank 0's, as a GPU's depends on its model."""
        device = self.operator.device
        generator = torch.Generator(device).manual_seed(0)
        noise = torch.randn(
            self.operator.size, generator=generator, dtype=self.operator.dtype, device=device
        )
        return self.operator.agree(noise)


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector)


def _usable(guess: Tensor) -> bool:
    length = float(torch.linalg.vector_norm(guess))
    return math.isfinite(length) and length > 0
