"""The largest eigenvalue of a symmetric operator, by Lanczos with a bound from above.

`hpc_absa.curvature.leading` finds several, `hpc_absa.curvature.power` is the reference.

Shapes:
    P  size of the operator
    m  basis vectors

Vectors have the operator's dtype (float32 in training), coefficients are float64. "Largest" is by
value, not by magnitude.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

Matvec = Callable[[Tensor], Tensor]
"""`v ↦ H v`, [P] to [P], H symmetric."""

Broadcast = Callable[[Tensor], Tensor]
"""Replaces a small float64 CPU tensor by rank 0's copy, so that all ranks branch alike."""

MISSES = 1 / 200
"""Share of the error bounds that need not hold, over the random part of the start."""

_CHUNK = 1 << 15
"""Elements of a dot product that a CPU sums in their own dtype; the chunks' sums are added in
float64. Accurate to 5e-7 in float32, and five times as fast as converting the vectors."""


_CANCELLATION = 0.1
"""A vector that is shorter than this after orthogonalization, relative to before, is orthogonalized
again: its rounding errors, 5e-7 before, are then that much larger."""


def no_broadcast(scalars: Tensor) -> Tensor:
    """The `Broadcast` of a single rank."""
    return scalars


def dots(vectors: Tensor, vector: Tensor) -> Tensor:
    """`Vᵀ w`: [m, P] and [P] to [m] float64, on the CPU."""
    chunk = _CHUNK if vector.device.type == "cpu" else 64 * _CHUNK
    if vector.numel() <= chunk:
        return torch.mv(vectors, vector).double().cpu()
    total = torch.zeros(len(vectors), dtype=torch.float64, device=vector.device)
    for start in range(0, vector.numel(), chunk):
        part = slice(start, start + chunk)
        total += torch.mv(vectors[:, part], vector[part])
    return total.cpu()


def norm(vector: Tensor, broadcast: Broadcast) -> float:
    """`‖v‖`, computed in float64."""
    return float(broadcast(dots(vector[None], vector).sqrt()[0]))


def combine(vectors: Tensor, weights: Tensor) -> Tensor:
    """`Σ_i c_i v_i`: [m, P] and [m] float64 to [P]."""
    return torch.mv(vectors.T, weights.to(vectors.dtype).to(vectors.device))


def _without(vector: Tensor, vectors: Tensor, weights: Tensor) -> Tensor:
    """`v − Σ_i c_i v_i`."""
    weights = weights.to(vectors.dtype).to(vectors.device)
    return torch.addmv(vector, vectors.T, weights, alpha=-1)


def negligible(like: Tensor) -> float:
    """64 ulp: a product below this, relative to ‖H‖, cannot be distinguished from zero."""
    return 64 * torch.finfo(like.dtype).eps


@dataclass(frozen=True)
class Eigenpair:
    """An approximate eigenpair."""

    value: float
    """Rayleigh quotient of `vector`: for the largest eigenvalue a lower bound."""
    vector: Tensor
    """[P], unit length."""
    residual: float
    """`‖Hv − λv‖ / |λ|`: some eigenvalue lies within this relative distance."""
    error: float
    """Estimated relative error of `value`, see `error_bound`."""
    converged: bool


@dataclass(frozen=True)
class Result:
    """Result of an eigensolver."""

    pairs: tuple[Eigenpair, ...]
    """Largest value first."""
    matvecs: int
    lowest: float
    """Smallest Ritz value: an upper bound of the smallest eigenvalue, negative at a saddle."""
    stopped: bool
    """Ended above the caller's `threshold`, not by the tolerance."""

    @property
    def top(self) -> Eigenpair:
        """The largest eigenvalue."""
        return self.pairs[0]


def error_bound(residual: float, value: float, neighbor: float) -> float:
    """Absolute error of a Ritz value: `min(r, r² / gap)`.

    The second is the Kato-Temple bound (Parlett, The Symmetric Eigenvalue Problem, 11.7), with
    the gap to `neighbor`, the best estimate of where the rest of the spectrum begins.
    """
    gap = value - neighbor
    return min(residual, residual * residual / gap) if gap > 0 else residual


def randomized(
    start: Tensor, noise: float = 1.0, seed: int = 0, broadcast: Broadcast = no_broadcast
) -> Tensor:
    """The start, normalized, plus `noise` times a random unit vector, [P].

    It has a component along every eigenvector, so that symmetry cannot hide one. A start that is
    zero or not finite is left out.
    """
    # Made on the device; broadcast, because a GPU's random numbers depend on its model.
    generator = torch.Generator(start.device).manual_seed(seed)
    random = torch.randn(len(start), generator=generator, dtype=start.dtype, device=start.device)
    random = broadcast(random)
    random /= torch.linalg.vector_norm(random)
    length = norm(start, broadcast)
    if not (math.isfinite(length) and length > 0):
        return random
    return random.mul_(noise).add_(start, alpha=1 / length)


def random_overlap(size: int, noise: float = 1.0) -> float:
    """The cosine of `randomized` with any direction exceeds this in 199 of 200 cases.

    The component of a random unit vector along a direction is close to normal with variance 1/P,
    so its density is at most `sqrt(P / 2π)`, whatever is added to it.
    """
    return MISSES / 2 * math.sqrt(2 * math.pi / size) * noise / (1 + noise)


@dataclass
class LanczosPolynomials:
    """Bounds the eigenvalues above the top Ritz value, from Lanczos coefficients.

    Let π_j be the Lanczos polynomials, `v_{j+1} = π_j(H) v_1`. For a unit eigenvector q with
    eigenvalue λ, `qᵀ v_{j+1} = π_j(λ) qᵀ v_1`. The v_j are orthonormal, hence
    `(qᵀ v_1)² Σ_j π_j(λ)² ≤ 1`, and the sum grows with λ above the top Ritz value. So the overlap
    `|qᵀ v_1|` of an eigenvector bounds its eigenvalue. (Van Dorsselaer, Hochstenbach and van der
    Vorst, SIAM J. Matrix Anal. Appl. 21 (2000), with all π_j instead of the last one.)
    """

    alphas: list[float]
    """Diagonal of the tridiagonal matrix, [m]."""
    betas: list[float]
    """Its off-diagonal [m]; the last one is the norm of the residual, positive."""

    def excludes(self, eigenvalue: float, overlap: float) -> bool:
        """Whether no eigenvector with this overlap or more can have the eigenvalue."""
        before, last, total, beta_before = 0.0, 1.0, 1.0, 0.0
        for alpha, beta in zip(self.alphas, self.betas, strict=True):
            following = ((eigenvalue - alpha) * last - beta_before * before) / beta
            before, last, beta_before = last, following, beta
            total += last * last
            if total * overlap * overlap > 1:
                return True
        return False

    def upper_bound(self, value: float, overlap: float) -> float:
        """The smallest eigenvalue excluded above the top Ritz value `value`, to 1e-3 of the gap."""
        low, high = 0.0, max(abs(value), *self.betas)
        smallest = 1e-16 * high
        while not self.excludes(value + high, overlap):
            low, high = high, 2 * high
        while high - low > 1e-3 * high and high > smallest:
            middle = (low + high) / 2 if low > 0 else high / 16
            excluded = self.excludes(value + middle, overlap)
            low, high = (low, middle) if excluded else (middle, high)
        return value + high


class Lanczos:
    """The largest eigenvalue by Lanczos with full re-orthogonalization.

    An iteration ends when the bound from above (`LanczosPolynomials`) is within the tolerance. The
    residual alone would not do: it shows that some eigenvalue is near, not that it is the largest.

    Args:
        matvec: the operator.
        start: [P]; from `randomized`, unless `overlap` is given.
        max_iter: maximum number of products. That many basis vectors are in memory.
        overlap: how much smaller the start's component along the top eigenvector is assumed to be,
            at worst, than along the vector found. By default nothing is assumed beyond the random
            part of the start (`random_overlap`): the error bound then holds in 199 of 200 cases
            for any operator.
        broadcast: makes scalars the same on all ranks.

    Raises:
        ValueError: `max_iter` is not positive.
    """

    def __init__(
        self,
        matvec: Matvec,
        start: Tensor,
        *,
        max_iter: int,
        overlap: float | None = None,
        broadcast: Broadcast = no_broadcast,
    ) -> None:
        if max_iter < 1:
            raise ValueError(f"max_iter: expected 1 or more, got {max_iter}")
        self.matvec, self.broadcast, self.overlap = matvec, broadcast, overlap
        self.steps, self.size = 0, start.numel()
        self.basis = start.new_empty(min(max_iter, self.size), self.size)
        self.projection = np.zeros((len(self.basis), len(self.basis)))
        self.polynomials = LanczosPolynomials([], [])
        self.residual, self.beta = start, norm(start, broadcast)
        """The next basis vector, not normalized, and its length."""

    def run(self, tol: float, threshold: float | None = None) -> Result:
        """Iterate until the error is at most `tol`, or `max_iter` products were made.

        Args:
            tol: relative error at which the eigenvalue counts as converged (`Eigenpair.error`).
            threshold: a Ritz value above it ends the iteration (`Result.stopped`).
        """
        while True:
            if self.steps:
                ritz = self._ritz(tol)
                stopped = threshold is not None and ritz.value > threshold
                if stopped or ritz.converged or self.steps == len(self.basis):
                    return self._result(ritz, stopped)
            if not self._extend():
                return not_finite(self.basis[0], self.steps)

    def separate(self, tol: float, limit: float) -> Result:
        """Continue until the bound from above is at most `limit`, or certainly cannot be."""
        while True:
            ritz = self._ritz(tol)
            below = ritz.value + ritz.error <= limit
            if below and ritz.overlap:
                below = self.polynomials.excludes(limit, ritz.overlap)
            if below or ritz.value > limit or self.steps == len(self.basis) or not ritz.overlap:
                return self._result(ritz, False, limit if below else math.inf)
            if not self._extend():
                return not_finite(self.basis[0], self.steps)

    def _extend(self) -> bool:
        """One product; False if it is not finite."""
        V = self.basis[: self.steps + 1]
        torch.div(self.residual, self.beta, out=V[-1])
        image = self.matvec(V[-1])
        column = self.broadcast(dots(V, image))
        self.steps += 1
        if not torch.isfinite(column).all():
            return False
        self.projection[self.steps - 1, : self.steps] = column  # eigh reads the lower triangle
        rest = _without(image, V, column)
        beta = norm(rest, self.broadcast)
        if beta < _CANCELLATION * float(column.norm()):  # "twice is enough" (Parlett 6.9)
            rest = _without(rest, V, self.broadcast(dots(V, rest)))
            beta = norm(rest, self.broadcast)
        self.residual, self.beta = rest, beta
        if self.beta > 0:
            self.polynomials.alphas.append(float(column[-1]))
            self.polynomials.betas.append(self.beta)
        return True

    def _ritz(self, tol: float) -> _RitzValue:
        """The top Ritz value, and whether its error is within the tolerance."""
        values, vectors = np.linalg.eigh(self.projection[: self.steps, : self.steps])
        value, coefficients = float(values[-1]), vectors[:, -1]
        residuals = self.beta * np.abs(vectors[-1])
        floor = negligible(self.basis) * float(np.abs(values).max())
        ritz = _RitzValue(value, float(values[0]), coefficients, float(residuals[-1]))
        if self.steps == self.size or self.beta <= floor:
            return dataclasses.replace(ritz, error=floor, converged=True)
        error, limit = ritz.residual, max(tol * abs(value), floor)
        if self.steps > 1:
            error = error_bound(error, value, float(values[-2] + residuals[-2]))
        least = random_overlap(self.size)
        if self.overlap is not None:
            least = self.overlap * abs(float(coefficients[0]))
        converged = error <= limit and self.polynomials.excludes(value + limit, least)
        return dataclasses.replace(ritz, error=error, converged=converged, overlap=least)

    def _result(self, ritz: _RitzValue, stopped: bool, excluded: float = math.inf) -> Result:
        """With the error bound; eigenvalues above `excluded` are known to be excluded."""
        error = ritz.error
        if ritz.overlap:
            bound = self.polynomials.upper_bound(ritz.value, ritz.overlap)
            error = max(error, min(bound, excluded) - ritz.value)
        pair = Eigenpair(
            ritz.value,
            combine(self.basis[: self.steps], torch.from_numpy(ritz.coefficients.copy())),
            relative(ritz.residual, ritz.value),
            relative(error, ritz.value),
            ritz.converged,
        )
        return Result((pair,), self.steps, ritz.lowest, stopped)


@dataclass(frozen=True)
class _RitzValue:
    """The top Ritz value of a `Lanczos` iteration; errors are absolute."""

    value: float
    lowest: float
    """The smallest Ritz value."""
    coefficients: Floats
    residual: float
    error: float = math.nan
    """Without the bound from above."""
    converged: bool = False
    overlap: float = 0.0
    """Of the start with the top eigenvector, at least; 0 if the subspace is invariant."""


def lanczos(
    matvec: Matvec,
    start: Tensor,
    *,
    tol: float,
    max_iter: int,
    overlap: float | None = None,
    broadcast: Broadcast = no_broadcast,
    threshold: float | None = None,
) -> Result:
    """The largest eigenvalue by `Lanczos`."""
    search = Lanczos(matvec, start, max_iter=max_iter, overlap=overlap, broadcast=broadcast)
    return search.run(tol, threshold)


def relative(absolute: float, value: float) -> float:
    if absolute == 0:
        return 0.0
    return absolute / abs(value) if value else math.inf


def not_finite(like: Tensor, matvecs: int) -> Result:
    """The result where a product contains a NaN or an infinity."""
    nan = math.nan
    pair = Eigenpair(nan, torch.full_like(like, nan), nan, nan, False)
    return Result((pair,), matvecs, nan, False)
