"""Lanczos and power iteration for the largest eigenvalues of a symmetric operator.

`lanczos` finds the largest one with a bound from above, `leading` several of them.

Shapes:
    P  size of the operator
    m  basis vectors
    k  eigenvalues wanted

Vectors have the operator's dtype (float32 in training), coefficients are float64. "Largest" is by
value, not by magnitude.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
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

CHECK_PRODUCTS = 6
"""Products spent on a random vector that checks an invariant subspace."""

_CHUNK = 1 << 15
"""Elements of a dot product that a CPU sums in their own dtype; the chunks' sums are added in
float64. Accurate to 5e-7 in float32, and five times as fast as converting the vectors."""


def no_broadcast(scalars: Tensor) -> Tensor:
    """The `Broadcast` of a single rank."""
    return scalars


def dots(vectors: Tensor, vector: Tensor) -> Tensor:
    """`Vᵀ w`: [m, P] and [P] to [m] float64, on the CPU."""
    total = torch.zeros(len(vectors), dtype=torch.float64, device=vector.device)
    chunk = _CHUNK if vector.device.type == "cpu" else 64 * _CHUNK
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


def negligible(like: Tensor) -> float:
    """64 ulp: a product below this, relative to ‖H‖, cannot be distinguished from zero."""
    return 64 * torch.finfo(like.dtype).eps


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
    """Ended by the caller's `stop`, not by the tolerance."""
    coefficients: Tensor
    """[m] float64: the top vector in terms of the m vectors multiplied; with `power`, the last."""

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
    """The largest eigenvalue by Lanczos with full re-orthogonalization.

    The iteration ends when the bound from above (`LanczosPolynomials`) is within the tolerance. The
    residual alone would not do: it shows that some eigenvalue is near, not that it is the largest.

    Args:
        matvec: the operator.
        start: [P]; from `randomized`, unless `overlap` is given.
        tol: relative error at which the eigenvalue counts as converged (`Eigenpair.error`).
        max_iter: maximum number of products. That many basis vectors are in memory.
        overlap: how much smaller the start's component along the top eigenvector is assumed to be,
            at worst, than along the vector found. By default nothing is assumed beyond the random
            part of the start (`random_overlap`): the error bound then holds in 199 of 200 cases
            for any operator.
        broadcast: makes scalars the same on all ranks.
        threshold: the caller asks whether the eigenvalue is at most this. A Ritz value above it
            ends the iteration (`Result.stopped`); a value below has converged only once the bound
            from above is below as well.

    Raises:
        ValueError: `max_iter` is not positive.
    """
    if max_iter < 1:
        raise ValueError(f"max_iter: expected 1 or more, got {max_iter}")
    size = start.numel()
    basis = start.new_empty(min(max_iter, size), size)
    projection = torch.zeros(len(basis), len(basis), dtype=torch.float64)
    polynomials = LanczosPolynomials([], [])
    vector = start / norm(start, broadcast)
    for m in range(1, len(basis) + 1):
        V = basis[:m]
        V[-1] = vector
        image = matvec(vector)
        column = broadcast(dots(V, image))
        if not torch.isfinite(column).all():
            return _not_finite(start, m)
        projection[m - 1, :m] = column  # eigh reads the lower triangle
        rest = image - combine(V, column)
        rest -= combine(V, broadcast(dots(V, rest)))  # "twice is enough" (Parlett 6.9)
        beta = norm(rest, broadcast)
        values, vectors = torch.linalg.eigh(projection[:m, :m])
        value, coefficients = float(values[-1]), vectors[:, -1]
        residuals = beta * vectors[-1].abs()
        floor = negligible(start) * float(values.abs().max())
        limit = max(tol * abs(value), floor)
        stopped = threshold is not None and value > threshold
        complete = m == size or beta <= floor
        if complete:
            error, converged = floor, True
        else:
            polynomials.alphas.append(float(column[-1]))
            polynomials.betas.append(beta)
            error = float(residuals[-1])
            if m > 1:
                error = error_bound(error, value, float(values[-2] + residuals[-2]))
            least = random_overlap(size)
            if overlap is not None:
                least = overlap * abs(float(coefficients[0]))
            converged = error <= limit and polynomials.excludes(value + limit, least)
            if converged and threshold is not None:
                converged = value + error <= threshold and polynomials.excludes(threshold, least)
        if stopped or converged:
            break
        vector = rest / beta
    if not complete:
        error = max(error, polynomials.upper_bound(value, least) - value)
    pair = Eigenpair(
        value,
        combine(V, coefficients),
        _relative(float(residuals[-1]), value),
        _relative(error, value),
        converged,
    )
    return Result((pair,), m, float(values[0]), stopped, coefficients.clone())


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
            return _not_finite(starts[0], matvecs)
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
    return Result(top, matvecs, lowest, False, coefficients[0])


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
    for pair in [pair for pair in leading if not pair.converged] + leading:
        if _leaves_space(space, [pair]):
            direction = space.orthogonal(pair.residual_vector)
            if direction is not None:
                return direction
    return None


def _leaves_space(space: Subspace, pairs: Sequence[_RitzPair]) -> bool:
    floor = negligible(space.V) * float(np.abs(space.ritz()[0]).max())
    return any(pair.residual > floor for pair in pairs)


def _random_direction(space: Subspace, generator: torch.Generator) -> Tensor | None:
    for _ in range(3):
        guess = torch.randn(space.V.shape[1], generator=generator, dtype=torch.float64)
        direction = space.orthogonal(guess.to(space.V))
        if direction is not None:
            return direction
    return None


def _relative(absolute: float, value: float) -> float:
    if absolute == 0:
        return 0.0
    return absolute / abs(value) if value else math.inf


def _eigenpair(space: Subspace, coefficients: Tensor, pair: _RitzPair) -> Eigenpair:
    vector = combine(space.V[: len(space)], coefficients)
    vector = vector / norm(vector, space.broadcast)
    return Eigenpair(
        pair.value,
        vector,
        _relative(pair.residual, pair.value),
        _relative(pair.error, pair.value),
        pair.converged,
    )


def _not_finite(like: Tensor, matvecs: int) -> Result:
    """The result where a product contains a NaN or an infinity."""
    nan = math.nan
    pair = Eigenpair(nan, torch.full_like(like, nan), nan, nan, False)
    return Result((pair,), matvecs, nan, False, torch.zeros(0, dtype=torch.float64))


def power(
    matvec: Matvec,
    start: Tensor,
    *,
    tol: float,
    max_iter: int,
    broadcast: Broadcast = no_broadcast,
    threshold: float | None = None,
) -> Result:
    """The largest eigenvalue by power iteration; the reference for `lanczos`.

    Rayleigh quotients converge geometrically, so the remaining error is estimated from the last two
    changes d' and d as `2 d · q / (1 − q)`, `q = |d / d'|` (Aitken's estimate, doubled). Where the
    iteration converges to a negative value, which is the largest by magnitude only, it continues
    with `H + σI`: the same vectors, with the largest value dominant.

    Arguments, errors and result as `lanczos`, for one pair.
    """
    if max_iter < 1:
        raise ValueError(f"max_iter: expected 1 or more, got {max_iter}")
    vector = start / norm(start, broadcast)
    shift, lowest, matvecs, stopped = 0.0, math.inf, 0, False
    history: list[float] = []
    while True:
        image = matvec(vector)
        matvecs += 1
        value = float(broadcast(dots(vector[None], image))[0])
        residual = norm(image - value * vector, broadcast)
        if not (math.isfinite(value) and math.isfinite(residual)):
            return _not_finite(start, matvecs)
        lowest = min(lowest, value)
        history.append(value)
        error = min(residual, _aitken(history))
        floor = negligible(start) * max(abs(value), shift)
        stationary = error <= max(tol * abs(value), floor)
        converged = stationary and (value >= 0 or shift > 0)
        pair = Eigenpair(
            value, vector, _relative(residual, value), _relative(error, value), converged
        )
        stopped = threshold is not None and value > threshold
        if stopped or converged or matvecs == max_iter:
            break
        if stationary:
            shift, history = abs(value), []
            vector = _perturbed(vector)
            continue
        following = image + shift * vector
        length = norm(following, broadcast)
        if length == 0:
            break
        vector = following / length
    return Result((pair,), matvecs, lowest, stopped, torch.ones(1, dtype=torch.float64))


def _aitken(history: list[float]) -> float:
    """Estimated distance of a geometric sequence from its limit; infinite for any other."""
    if len(history) < 3:
        return math.inf
    before, last = history[-2] - history[-3], history[-1] - history[-2]
    if last == 0:
        return 0.0
    ratio = abs(last / before) if before else math.inf
    return 2 * abs(last) * ratio / (1 - ratio) if ratio < 1 else math.inf


def _perturbed(vector: Tensor) -> Tensor:
    """Half `vector`, half noise, normalized: a start for the shifted operator."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(vector.numel(), generator=generator, dtype=torch.float64).to(vector)
    mixed = vector + noise / torch.linalg.vector_norm(noise)
    return mixed / torch.linalg.vector_norm(mixed)
