"""Several of the largest eigenvalues of a symmetric operator, for a spectrum.

Shapes:
    P  size of the operator
    m  basis vectors
    k  eigenvalues wanted
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpc_absa.curvature.eigen import (
    Broadcast,
    Eigenpair,
    Floats,
    Matvec,
    Result,
    combine,
    dots,
    error_bound,
    negligible,
    no_broadcast,
    norm,
    not_finite,
    relative,
)

CHECK_PRODUCTS = 6
"""Products spent on a random vector that checks an invariant subspace."""


class Subspace:
    """An orthonormal basis V, its image W = HV and the projection T = VᵀHV."""

    def __init__(self, like: Tensor, capacity: int, broadcast: Broadcast) -> None:
        self.V = like.new_empty(capacity, like.numel())
        self.W = like.new_empty(capacity, like.numel())
        self.T = np.zeros((0, 0))
        self.broadcast = broadcast

    def __len__(self) -> int:
        return len(self.T)

    def project_out(self, vector: Tensor) -> Tensor:
        """`(I − VVᵀ) v`; in floating point to be repeated for orthogonality."""
        basis = self.V[: len(self)]
        return vector - combine(basis, self.broadcast(dots(basis, vector)))

    def orthogonal(self, vector: Tensor) -> Tensor | None:
        """`(I − VVᵀ) v` normalized; None where it is zero or not finite."""
        length = norm(vector, self.broadcast)
        if not (math.isfinite(length) and length > 0):
            return None
        vector = vector / length
        for _ in range(3):  # "twice is enough" (Parlett 6.9), once more for float32
            vector = self.project_out(vector)
            length = norm(vector, self.broadcast)
            if length < negligible(vector):
                return None
            vector = vector / length
        return vector

    def add(self, vector: Tensor, image: Tensor) -> bool:
        """Append a unit vector and its product; False, and no change, if that is not finite."""
        m = len(self)
        self.V[m], self.W[m] = vector, image
        column = self.broadcast(dots(self.V[: m + 1], image)).numpy()
        if not np.isfinite(column).all():
            return False
        projection = np.zeros((m + 1, m + 1))
        projection[:m, :m] = self.T
        projection[m, :] = projection[:, m] = column
        self.T = projection
        return True

    def ritz(self) -> tuple[Floats, Tensor]:
        """Ritz values, largest first [m], and the Ritz vectors' coefficients, one a row [m, m]."""
        values, columns = np.linalg.eigh(self.T)
        return values[::-1], torch.from_numpy(columns.T[::-1].copy())

    def residual(self, value: float, coefficients: Tensor) -> Tensor:
        """`H y − θ y` of a Ritz pair, [P]."""
        m = len(self)
        return combine(self.W[:m], coefficients) - value * combine(self.V[:m], coefficients)


def leading(
    matvec: Matvec,
    starts: Sequence[Tensor],
    *,
    tol: float,
    max_iter: int,
    k: int,
    broadcast: Broadcast = no_broadcast,
) -> Result:
    """The `k` largest eigenvalues, for a spectrum; `lanczos` has the better bound for one.

    The basis begins with `starts`, orthogonalized, and grows by the residual `H y − θ y` of the
    first leading Ritz pair that has not converged. From a single start this residual points along
    the next Lanczos vector, so the method is Lanczos. From several starts it continues with the
    best pair of their span, where a block method would multiply the whole block each time.

    An invariant subspace gives no information about the rest of the spectrum. There a random vector
    is added and followed for `CHECK_PRODUCTS` products; the result is accepted only if it stays the
    same. This check is always made, because a single Krylov space contains only one copy of a
    repeated eigenvalue.

    Args:
        matvec: the operator.
        starts: initial guesses [P], best first; zero and linearly dependent ones are skipped.
        tol: relative error at which a pair counts as converged (`Eigenpair.error`).
        max_iter: maximum number of products. That many basis vectors and products are in memory.
        k: eigenvalues wanted.
        broadcast: makes scalars the same on all ranks.

    Raises:
        ValueError: `starts` is empty, or `max_iter` is not positive.
    """
    if not starts or max_iter < 1:
        raise ValueError(f"expected a start and max_iter >= 1, got {len(starts)} and {max_iter}")
    size = starts[0].numel()
    space = Subspace(starts[0], min(max_iter, size), broadcast)
    queue = list(starts)
    generator = torch.Generator().manual_seed(0)
    ritz: list[_RitzPair] = []
    lowest, matvecs = math.inf, 0
    unchecked: list[float] | None = None
    check_products = 0
    while matvecs < max_iter and len(space) < size:
        direction = _next_direction(space, queue, ritz)
        if direction is None:
            direction = _random_direction(space, generator)
            unchecked, check_products = [pair.value for pair in ritz[:k]], CHECK_PRODUCTS
        if direction is None:
            break
        image = matvec(direction)
        matvecs += 1
        if not space.add(direction, image):
            return not_finite(starts[0], matvecs)
        ritz = _leading(space, k, tol)
        lowest = min(lowest, float(space.ritz()[0][-1]))
        if check_products > 0:
            queue, check_products = [*queue, image], check_products - 1
        if queue or len(space) < min(size, k + 1) or not all(p.converged for p in ritz[:k]):
            continue
        if (
            unchecked is not None
            and len(unchecked) == len(ritz[:k])
            and np.allclose(unchecked, [pair.value for pair in ritz[:k]], rtol=tol, atol=0)
        ):
            break
        # As if the subspace were invariant, so that the next direction is a random one.
        ritz = [dataclasses.replace(pair, residual=0.0) for pair in ritz]
    coefficients = space.ritz()[1]
    top = tuple(_eigenpair(space, c, p) for c, p in zip(coefficients, ritz[:k], strict=False))
    return Result(top, matvecs, lowest, False)


@dataclass(frozen=True)
class _RitzPair:
    """A leading Ritz pair, its vector not computed."""

    value: float
    residual_vector: Tensor
    """`H y − θ y`, [P]."""
    residual: float
    """Absolute."""
    error: float
    """Absolute."""
    converged: bool


def _leading(space: Subspace, k: int, tol: float) -> list[_RitzPair]:
    """The `k` leading pairs and one more, with their error bounds."""
    values, coefficients = space.ritz()
    count = min(k + 1, len(space))
    vectors = [space.residual(values[i], coefficients[i]) for i in range(count)]
    residuals = [norm(vector, space.broadcast) for vector in vectors]
    floor = negligible(space.V) * float(np.abs(values).max())
    pairs = []
    for i, residual in enumerate(residuals):
        error = residual
        if i + 1 < count:
            error = error_bound(residual, values[i], values[i + 1] + residuals[i + 1])
        if i > 0:
            error = max(error, error_bound(residual, values[i - 1] - residuals[i - 1], values[i]))
        if len(space) < 3:
            error = min(2 * error, residual)  # the gap is poorly known from two vectors
        if len(space) == space.V.shape[1]:
            error = min(error, floor)
        converged = bool(error <= max(tol * abs(float(values[i])), floor))
        pairs.append(_RitzPair(float(values[i]), vectors[i], residual, error, converged))
    return pairs


def _next_direction(
    space: Subspace, queue: list[Tensor], leading: list[_RitzPair]
) -> Tensor | None:
    """A unit vector that extends the basis: a queued guess, or a leading pair's residual."""
    while queue:
        direction = space.orthogonal(queue.pop(0))
        if direction is not None:
            return direction
    if not leading:
        return None
    floor = negligible(space.V) * float(np.abs(space.ritz()[0]).max())
    for pair in [pair for pair in leading if not pair.converged] + leading:
        if pair.residual > floor:
            direction = space.orthogonal(pair.residual_vector)
            if direction is not None:
                return direction
    return None


def _random_direction(space: Subspace, generator: torch.Generator) -> Tensor | None:
    for _ in range(3):
        guess = torch.randn(space.V.shape[1], generator=generator, dtype=torch.float64)
        direction = space.orthogonal(guess.to(space.V))
        if direction is not None:
            return direction
    return None


def _eigenpair(space: Subspace, coefficients: Tensor, pair: _RitzPair) -> Eigenpair:
    vector = combine(space.V[: len(space)], coefficients)
    vector = vector / norm(vector, space.broadcast)
    return Eigenpair(
        pair.value,
        vector,
        relative(pair.residual, pair.value),
        relative(pair.error, pair.value),
        pair.converged,
    )
