"""Trace and spectral density of a symmetric operator, estimated from random vectors.

Shapes: P the operator's size, m Lanczos steps, s probe vectors, G grid points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_absa.curvature.eigen import Matvec
from hpc_absa.curvature.subspace import Agree, Subspace, dots

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """`tr H` by Hutch++, with its standard error."""

    value: float
    error: float
    """Standard error over the probe vectors of the part that is estimated."""
    matvecs: int


@dataclass(frozen=True)
class Density:
    """The eigenvalues' density by stochastic Lanczos quadrature."""

    grid: Floats
    """[G], eigenvalues."""
    density: Floats
    """[G], share of the eigenvalues per unit, integrating to 1: a Gaussian of `width` per node."""
    error: Floats
    """[G], standard error over the probe vectors."""
    width: float
    nodes: Floats
    """[s, m], Ritz values of each probe vector."""
    weights: Floats
    """[s, m], their weights, each row summing to 1."""
    negative: float
    """Share of the eigenvalues below `-cutoff`: directions in which the loss curves down."""
    negative_low: float
    """The share is at least this, see `below`."""
    negative_high: float
    """The share is at most this."""
    negative_least: int
    """Eigenvalues that are below `-cutoff` for certain: so many Ritz values of one probe vector
    are, and the n-th eigenvalue is never above the n-th Ritz value (Cauchy)."""
    cutoff: float
    """Below it a value is not told from zero."""
    matvecs: int

    def below(self, limit: float) -> tuple[float, float, float]:
        """The share of the eigenvalues below `limit`: an estimate, and bounds.

        A quadrature node stands for eigenvalues on both sides of it, so the shares of the two nodes
        around the limit may lie on either side (Chebyshev, Markov and Stieltjes: Golub and Meurant
        2010, 6.2.1); a standard error over the probe vectors is added to either bound.
        """
        shares = [_below(n, w, limit) for n, w in zip(self.nodes, self.weights, strict=True)]
        estimate, low, high = np.array(shares).mean(0)
        error = np.nan_to_num(_standard_error(np.array(shares)))
        return float(estimate), max(0.0, float(low - error[1])), min(1.0, float(high + error[2]))


def _below(nodes: Floats, weights: Floats, limit: float) -> tuple[float, float, float]:
    nodes, weights = nodes[weights > 0], weights[weights > 0]
    order = np.argsort(nodes)
    count = int((nodes < limit).sum())
    total = np.concatenate([[0.0], np.cumsum(weights[order])])
    return total[count], total[max(0, count - 1)], total[min(len(nodes), count + 1)]


def hutch(
    matvec: Matvec,
    like: Tensor,
    *,
    matvecs: int,
    seed: int = 0,
    agree: Agree = lambda scalars: scalars,
) -> Trace:
    """Trace by Hutch++ (Meyer, Musco, Musco, Woodruff 2021, algorithm 1).

    `tr H = tr(QᵀHQ) + tr((I − QQᵀ) H (I − QQᵀ))`, Q an orthonormal basis of HS for random signs
    S [P, j]: the first term exactly, the rest by Hutchinson's estimator. A third of the products
    each for S, Q and Hutchinson; exact where `matvecs` allows Q to span everything.

    Args:
        matvec: symmetric.
        like: [P], for size, type and device.
        matvecs: at least 6.
        seed: of the random signs.
        agree: makes scalars the same on all ranks.
    """
    if matvecs < 6:
        raise ValueError(f"matvecs: expected 6 or more (a third of them sketch), got {matvecs}")
    third = min(matvecs // 3, like.numel())
    space = Subspace(like, third, agree)
    spent, exact = 0, 0.0
    for index in range(third):
        direction = space.orthogonal(matvec(random_signs(like, seed + index)))
        spent += 1
        if direction is None:
            continue
        image = matvec(direction)
        spent += 1
        if not space.add(direction, image):
            return Trace(math.nan, math.nan, spent)
        exact = float(np.trace(space.T))
    rest = []
    if len(space) < like.numel():
        for index in range(matvecs - 2 * third):
            probe = space.project_out(random_signs(like, seed + 10_000 + index))
            rest.append(float(agree(dots(probe[None], matvec(probe)))[0]))
            spent += 1
    estimate = float(np.mean(rest)) if rest else 0.0
    error = float(np.std(rest, ddof=1) / math.sqrt(len(rest))) if len(rest) > 1 else 0.0
    return Trace(exact + estimate, error, spent)


def quadrature(
    matvec: Matvec,
    like: Tensor,
    *,
    steps: int,
    probes: int,
    points: int = 400,
    width: float = 0.0,
    seed: int = 0,
    agree: Agree = lambda scalars: scalars,
) -> Density:
    """Spectral density by stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017, section 3).

    Each probe vector's m Ritz values, weighted by the squared first components of their
    coordinates, integrate `φ ↦ tr φ(H) / P` as well as 2m moments allow; smoothed by a Gaussian.

    Args:
        matvec: symmetric.
        like: [P], for size, type and device.
        steps: m, products a probe vector.
        probes: s; the errors are the scatter over them.
        points: G.
        width: of the Gaussian; 0 for a hundredth of the spectrum's extent.
        seed: of the random vectors.
        agree: makes scalars the same on all ranks.
    """
    steps = min(steps, like.numel())
    nodes, weights, spent = np.zeros((probes, steps)), np.zeros((probes, steps)), 0
    for index in range(probes):
        values, shares, products = _nodes(matvec, random_vector(like, seed + index), steps, agree)
        nodes[index, : len(values)], weights[index, : len(values)] = values, shares
        spent += products
    low, high = nodes[weights > 0].min(initial=0.0), nodes[weights > 0].max(initial=0.0)
    extent = float(high - low) or 1.0
    width = width or extent / 100
    grid = np.linspace(low - 5 * width, high + 5 * width, points)
    curves = np.stack([_smooth(grid, n, w, width) for n, w in zip(nodes, weights, strict=True)])
    cutoff = 1e-4 * max(abs(low), abs(high))
    found = Density(
        grid, curves.mean(0), _standard_error(curves), width, nodes, weights, math.nan, math.nan,
        math.nan, int((nodes < -cutoff).sum(1).max()), float(cutoff), spent,
    )  # fmt: skip
    share, least, most = found.below(-cutoff)
    return replace(found, negative=share, negative_low=least, negative_high=most)


def _nodes(matvec: Matvec, start: Tensor, steps: int, agree: Agree) -> tuple[Floats, Floats, int]:
    """Ritz values and weights of one probe vector, and the products they took."""
    space = Subspace(start, steps, agree)
    vector: Tensor | None = start
    spent = 0
    while spent < steps and vector is not None:
        direction = space.orthogonal(vector)
        if direction is None:
            break
        vector = matvec(direction)
        spent += 1
        if not space.add(direction, vector):
            return np.full(1, math.nan), np.ones(1), spent
    values, coordinates = space.ritz()
    return values, coordinates[0] ** 2, spent


def _smooth(grid: Floats, nodes: Floats, weights: Floats, width: float) -> Floats:
    scaled = (grid[:, None] - nodes[None]) / width
    bells = np.exp(-0.5 * scaled**2) / (width * math.sqrt(2 * math.pi))
    return np.asarray(bells @ weights, dtype=np.float64)


def _standard_error(rows: Floats) -> Any:
    """Of the mean over the first axis; NaN for a single row."""
    if len(rows) < 2:
        return np.full(rows.shape[1:], math.nan)
    return rows.std(0, ddof=1) / math.sqrt(len(rows))


def random_vector(like: Tensor, seed: int) -> Tensor:
    """Standard normal [P], the same on every rank and device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.numel(), generator=generator, dtype=torch.float64).to(like)


def random_signs(like: Tensor, seed: int) -> Tensor:
    """±1 [P], the same on every rank and device."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (like.numel(),), generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(like)
