"""Power iteration for the largest eigenvalue of a symmetric operator."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hpc_absa.curvature.eigen import (
    Broadcast,
    Eigenpair,
    Matvec,
    Result,
    dots,
    negligible,
    no_broadcast,
    norm,
    not_finite,
    relative,
)


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
            return not_finite(start, matvecs)
        lowest = min(lowest, value)
        history.append(value)
        error = min(residual, _aitken(history))
        floor = negligible(start) * max(abs(value), shift)
        stationary = error <= max(tol * abs(value), floor)
        converged = stationary and (value >= 0 or shift > 0)
        pair = Eigenpair(
            value, vector, relative(residual, value), relative(error, value), converged
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
    return Result((pair,), matvecs, lowest, stopped)


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
