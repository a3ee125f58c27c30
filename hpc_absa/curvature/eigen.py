"""Eigenvalues of a symmetric operator known only by its products with vectors.

Shapes: P the operator's size, m the number of basis vectors. Vectors are of the operator's type
(float32 in training); every coefficient is float64. Eigenvalues are ordered by value, not by
magnitude: a strongly negative one is not "the top".
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpc_absa.curvature.subspace import Agree, Subspace, combine, dots, negligible, norm

Matvec = Callable[[Tensor], Tensor]
"""`v ↦ H v`, [P] to [P], H symmetric."""

CHALLENGE = 6
"""Products for which a random vector is followed: enough for what stands out of the rest."""


@dataclass(frozen=True)
class Pair:
    """An approximate eigenpair with its evidence."""

    value: float
    """Rayleigh quotient of `vector`: for the top eigenvalue always a lower bound."""
    vector: Tensor
    """[P], unit length."""
    residual: float
    """`‖Hv − λv‖ / |λ|`: some eigenvalue lies within this relative distance."""
    error: float
    """Estimated relative error of `value`: `min(r, r² / gap)`, see `error_bound`."""
    converged: bool


@dataclass(frozen=True)
class Result:
    """What a run of an eigensolver found."""

    pairs: tuple[Pair, ...]
    """Largest value first."""
    matvecs: int
    lowest: float
    """Smallest Ritz value: an upper bound of the smallest eigenvalue, negative at a saddle."""
    stopped: bool
    """Ended by the caller's `stop`, not by the tolerance."""
    combination: Tensor
    """[m] float64: the top pair's vector in terms of the vectors multiplied."""

    @property
    def top(self) -> Pair:
        """The largest eigenvalue."""
        return self.pairs[0]


def error_bound(residual: float, value: float, rival: float) -> float:
    """Absolute error of a Ritz value: `min(r, r² / gap)`.

    The square is Kato and Temple's bound (Parlett, The Symmetric Eigenvalue Problem, 11.7) for a
    gap to the rest of the spectrum; `rival` is the best estimate of where that begins.
    """
    gap = value - rival
    return min(residual, residual * residual / gap) if gap > 0 else residual


def lanczos(
    matvec: Matvec,
    starts: Sequence[Tensor],
    *,
    tol: float,
    max_iter: int,
    k: int = 1,
    capacity: int = 0,
    agree: Agree = lambda scalars: scalars,
    stop: Callable[[float], bool] | None = None,
    seed: int = 0,
) -> Result:
    """The `k` largest eigenvalues by Lanczos with full re-orthogonalization.

    The basis begins with `starts`, orthogonalized, and grows by the residual of the leading pair
    that has not converged. From a single start that residual points along the next Lanczos vector,
    so this is Lanczos's method; from several it goes on from the best their span holds, where a
    block method would multiply the whole block each time.

    Where the products stay in the basis, an invariant subspace is found and says nothing about the
    rest: a random vector is taken in and followed for `CHALLENGE` products, and the run ends only
    when that has not changed the answer. With k > 1 it is done in any case, so that the copies of a
    repeated eigenvalue are found too.

    Args:
        matvec: the operator.
        starts: guesses [P], best first; zero and dependent ones are passed over.
        tol: relative error at which a pair counts as converged (`Pair.error`).
        max_iter: products at most.
        k: eigenvalues wanted.
        capacity: basis vectors in memory, each with its product; 0 for as many as `max_iter`.
            When full, the basis is compressed to the leading Ritz vectors (thick restart).
        agree: makes scalars the same on all ranks.
        stop: asked with the top Ritz value after each product; True ends the run.
        seed: of the vectors that replace exhausted guesses.

    Raises:
        ValueError: no start to take the size from, or fewer than one product.
    """
    if not starts or max_iter < 1:
        raise ValueError(f"expected a start and max_iter >= 1, got {len(starts)} and {max_iter}")
    size = starts[0].numel()
    capacity = max(capacity or max_iter, 2 * k + 2)
    space = Subspace(starts[0], min(capacity, size), agree)
    queue = list(starts)
    generator = torch.Generator().manual_seed(seed)
    leading: list[_Leading] = []
    lowest, matvecs, stopped = math.inf, 0, False
    challenged: list[float] | None = None
    follow = 0
    while matvecs < max_iter and len(space) < size:
        if space.full:
            space.restart(max(k + 1, len(space) // 2))
        direction = _next_direction(space, queue, leading)
        if direction is None:
            direction, challenged = _random_direction(space, generator), _values(leading[:k])
            follow = CHALLENGE
        if direction is None:
            break
        image = matvec(direction)
        matvecs += 1
        if not space.add(direction, image):
            return _broken(starts[0], matvecs)
        leading = _leading(space, k, tol)
        lowest = min(lowest, float(space.ritz()[0][-1]))
        if stop is not None and stop(leading[0].value):
            stopped = True
            break
        if follow > 0:
            queue, follow = [*queue, image], follow - 1
        if queue or len(space) < min(size, k + 1) or not all(p.converged for p in leading[:k]):
            continue
        if challenged is None and k == 1 and _open(space, leading):
            break
        if challenged is not None and _unchanged(challenged, _values(leading[:k]), tol):
            break
        leading = [dataclasses.replace(p, residual=0.0) for p in leading]  # a new challenge
    pairs = tuple(_pair(space, index, found) for index, found in enumerate(leading[:k]))
    return Result(pairs, matvecs, lowest, stopped, _coordinates(space.ritz()[1][:, 0]))


@dataclass(frozen=True)
class _Leading:
    """A leading Ritz pair without its vector."""

    value: float
    direction: Tensor
    """`H y − θ y`, [P]."""
    residual: float
    """Absolute."""
    error: float
    """Absolute."""
    converged: bool


def _leading(space: Subspace, k: int, tol: float) -> list[_Leading]:
    """The `k` leading pairs and one more, with their error bounds."""
    values, coordinates = space.ritz()
    count = min(k + 1, len(space))
    directions = [space.residual(values[i], coordinates[:, i]) for i in range(count)]
    lengths = [float(space.agree(norm(direction))) for direction in directions]
    floor = negligible(space.V) * float(np.abs(values).max())
    found = []
    for i in range(count):
        error = lengths[i]
        if i + 1 < count:
            error = error_bound(lengths[i], values[i], values[i + 1] + lengths[i + 1])
        if i > 0:
            error = max(error, error_bound(lengths[i], values[i - 1] - lengths[i - 1], values[i]))
        if len(space) < 3:
            error = min(2 * error, lengths[i])  # two vectors know little of where the rest begins
        if len(space) == space.V.shape[1]:
            error = min(error, floor)
        good = bool(error <= max(tol * abs(float(values[i])), floor))
        found.append(_Leading(float(values[i]), directions[i], lengths[i], error, good))
    return found


def _next_direction(space: Subspace, queue: list[Tensor], leading: list[_Leading]) -> Tensor | None:
    """A unit vector that adds to the basis: a guess, or the residual of a leading pair."""
    while queue:
        direction = space.orthogonal(queue.pop(0))
        if direction is not None:
            return direction
    unfinished = [pair for pair in leading if not pair.converged]
    for pair in unfinished + leading:
        if _open(space, [pair]):
            direction = space.orthogonal(pair.direction)
            if direction is not None:
                return direction
    return None


def _open(space: Subspace, leading: Sequence[_Leading]) -> bool:
    """Whether the products of these pairs leave the basis."""
    floor = negligible(space.V) * float(np.abs(space.ritz()[0]).max())
    return any(pair.residual > floor for pair in leading)


def _random_direction(space: Subspace, generator: torch.Generator) -> Tensor | None:
    """A challenge to a basis that its own products never leave: what it lacks shows up in this."""
    for _ in range(3):
        guess = torch.randn(space.V.shape[1], generator=generator, dtype=torch.float64)
        direction = space.orthogonal(guess.to(space.V))
        if direction is not None:
            return direction
    return None


def _coordinates(column: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(column))


def _values(leading: Sequence[_Leading]) -> list[float]:
    return [pair.value for pair in leading]


def _unchanged(before: Sequence[float], after: Sequence[float], tol: float) -> bool:
    return len(before) == len(after) and np.allclose(before, after, rtol=tol, atol=0)


def _relative(absolute: float, value: float) -> float:
    if absolute == 0:
        return 0.0
    return absolute / abs(value) if value else math.inf


def _pair(space: Subspace, index: int, found: _Leading) -> Pair:
    vector = combine(space.V[: len(space)], _coordinates(space.ritz()[1][:, index]))
    vector = vector / float(space.agree(norm(vector)))
    residual, error = (_relative(x, found.value) for x in (found.residual, found.error))
    return Pair(found.value, vector, residual, error, found.converged)


def _broken(like: Tensor, matvecs: int) -> Result:
    """What a NaN or an infinity among the products leaves to say."""
    nan = math.nan
    pair = Pair(nan, torch.full_like(like, nan), nan, nan, False)
    return Result((pair,), matvecs, nan, False, torch.zeros(0, dtype=torch.float64))


def power(
    matvec: Matvec,
    start: Tensor,
    *,
    tol: float,
    max_iter: int,
    agree: Agree = lambda scalars: scalars,
    stop: Callable[[float], bool] | None = None,
) -> Result:
    """The largest eigenvalue by power iteration, the talk's method: the reference for `lanczos`.

    Rayleigh quotients approach their limit geometrically, so the error still to come is estimated
    from the last two changes d and d' as `2 d · q / (1 − q)`, `q = |d / d'|` (Aitken, doubled).
    Where the iteration settles on a negative value, the largest by magnitude but not by value, it
    goes on with `H + σI`, which has the same vectors and its largest value on top.

    Args, errors and result as `lanczos`, for one pair.
    """
    if max_iter < 1:
        raise ValueError(f"max_iter: expected 1 or more, got {max_iter}")
    vector = start / float(agree(norm(start)))
    shift, lowest, stopped = 0.0, math.inf, False
    history: list[float] = []
    pair = _broken(start, 0).top
    matvecs = 0
    while matvecs < max_iter:
        image = matvec(vector)
        matvecs += 1
        value = float(agree(dots(vector[None], image))[0])
        length = float(agree(norm(image - value * vector)))
        if not (math.isfinite(value) and math.isfinite(length)):
            return _broken(start, matvecs)
        lowest = min(lowest, value)
        history.append(value)
        error = min(length, _aitken(history))
        floor = negligible(start) * max(abs(value), shift)
        stopped_above_threshold = error <= max(tol * abs(value), floor)
        done = stopped_above_threshold and (value >= 0 or shift > 0)
        pair = Pair(value, vector, _relative(length, value), _relative(error, value), done)
        if stop is not None and stop(value):
            stopped = True
            break
        if pair.converged:
            break
        if stopped_above_threshold:
            shift, history = abs(value), []
            vector = _perturbed(vector, start)
            continue
        following = image + shift * vector
        length = float(agree(norm(following)))
        if length == 0:
            break
        vector = following / length
    return Result((pair,), matvecs, lowest, stopped, torch.ones(1, dtype=torch.float64))


def _aitken(history: list[float]) -> float:
    """Estimated distance of a geometric sequence from its limit; infinite where it is not one."""
    if len(history) < 3:
        return math.inf
    before, last = history[-2] - history[-3], history[-1] - history[-2]
    if last == 0:
        return 0.0
    ratio = abs(last / before) if before else math.inf
    return 2 * abs(last) * ratio / (1 - ratio) if ratio < 1 else math.inf


def _perturbed(vector: Tensor, start: Tensor) -> Tensor:
    """Half the found vector, half noise: a start for the shifted operator."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(start.numel(), generator=generator, dtype=torch.float64).to(start)
    mixed = vector + noise / torch.linalg.vector_norm(noise)
    return mixed / torch.linalg.vector_norm(mixed)
