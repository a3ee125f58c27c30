"""Trace and spectral density of a symmetric operator, estimated from random vectors.

Shapes:
    P  size of the operator
    m  Lanczos steps
    s  probe vectors
    G  grid points
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_absa.curvature.eigen import Broadcast, Floats, Matvec, dots, no_broadcast
from hpc_absa.curvature.leading import Subspace


@dataclass(frozen=True)
class Trace:
    """`tr H` with its standard error."""

    value: float
    error: float
    """Standard error over the probe vectors of the part that is estimated."""
    matvecs: int


@dataclass(frozen=True)
class Density:
    """Density of the eigenvalues by stochastic Lanczos quadrature."""

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
    """Share of the eigenvalues below `-cutoff`: directions of negative curvature."""
    negative_low: float
    """Lower bound of the share, see `below`."""
    negative_high: float
    """Upper bound of the share."""
    negative_least: int
    """Number of eigenvalues that are certainly below `-cutoff`: so many Ritz values of one probe
    vector are, and the n-th eigenvalue is at most the n-th Ritz value (Cauchy)."""
    cutoff: float
    """Eigenvalues of smaller magnitude cannot be distinguished from zero."""
    matvecs: int

    def below(self, limit: float) -> tuple[float, float, float]:
        """Share of the eigenvalues below `limit`: estimate, lower and upper bound.

        A quadrature node stands for eigenvalues on both sides of it, so the weights of the two
        nodes around the limit may lie on either side (Chebyshev, Markov and Stieltjes: Golub and
        Meurant 2010, 6.2.1). A standard error over the probe vectors is added to both bounds.
        """
        return _share_below(self.nodes, self.weights, limit)


def _share_below(nodes: Floats, weights: Floats, limit: float) -> tuple[float, float, float]:
    shares = np.array([_probe_share(n, w, limit) for n, w in zip(nodes, weights, strict=True)])
    estimate, low, high = shares.mean(0)
    error = np.nan_to_num(_standard_error(shares))
    return float(estimate), max(0.0, float(low - error[1])), min(1.0, float(high + error[2]))


def _probe_share(nodes: Floats, weights: Floats, limit: float) -> tuple[float, float, float]:
    nodes, weights = nodes[weights > 0], weights[weights > 0]
    order = np.argsort(nodes)
    count = int((nodes < limit).sum())
    total = np.concatenate([[0.0], np.cumsum(weights[order])])
    return total[count], total[max(0, count - 1)], total[min(len(nodes), count + 1)]


def hutchpp_trace(
    matvec: Matvec,
    like: Tensor,
    *,
    matvecs: int,
    seed: int = 0,
    broadcast: Broadcast = no_broadcast,
) -> Trace:
    """Trace by Hutch++ (Meyer, Musco, Musco, Woodruff 2021, algorithm 1).

    `tr H = tr(QᵀHQ) + tr((I − QQᵀ) H (I − QQᵀ))`, Q an orthonormal basis of HS for random signs
    S [P, matvecs / 3]. The first term is exact, the second is Hutchinson's estimator. HS, HQ and
    the estimator take a third of the products each. With P ≤ `matvecs` the trace is computed
    exactly, from the diagonal.

    Args:
        matvec: the operator.
        like: [P], for size, dtype and device.
        matvecs: number of products, at least 6.
        seed: of the random signs.
        broadcast: makes scalars the same on all ranks.
    """
    if matvecs < 6:
        raise ValueError(f"matvecs: expected 6 or more (a third of them sketch), got {matvecs}")
    if like.numel() <= matvecs:
        return _exact_trace(matvec, like, broadcast)
    third = matvecs // 3
    space = Subspace(like, third, broadcast)
    count = 0
    for index in range(third):
        direction = space.orthogonal(matvec(random_signs(like, seed + index)))
        count += 1
        if direction is None:
            continue
        image = matvec(direction)
        count += 1
        if not space.add(direction, image):
            return Trace(math.nan, math.nan, count)
    rest = []
    for index in range(matvecs - 2 * third):
        probe = random_signs(like, seed + 10_000 + index)
        probe = space.project_out(space.project_out(probe))
        rest.append(float(broadcast(dots(probe[None], matvec(probe)))[0]))
    error = float(np.std(rest, ddof=1) / math.sqrt(len(rest)))
    return Trace(float(np.trace(space.T)) + float(np.mean(rest)), error, count + len(rest))


def _exact_trace(matvec: Matvec, like: Tensor, broadcast: Broadcast) -> Trace:
    total = torch.zeros(1, dtype=torch.float64)
    for index in range(like.numel()):
        unit = torch.zeros_like(like)
        unit[index] = 1
        total += float(matvec(unit)[index])
    return Trace(float(broadcast(total)[0]), 0.0, like.numel())


def spectral_density(
    matvec: Matvec,
    like: Tensor,
    *,
    steps: int,
    probes: int,
    points: int = 400,
    seed: int = 0,
    broadcast: Broadcast = no_broadcast,
) -> Density:
    """Spectral density by stochastic Lanczos quadrature (Ubaru, Chen, Saad 2017, section 3).

    Each probe vector's m Ritz values, weighted by the squared first components of their
    coefficients, integrate `φ ↦ tr φ(H) / P` as well as 2m moments allow. The nodes are smoothed
    by a Gaussian whose width is a hundredth of the spectrum's extent.

    Args:
        matvec: the operator.
        like: [P], for size, dtype and device.
        steps: m, products per probe vector.
        probes: s; the errors are the scatter over them.
        points: G.
        seed: of the random vectors.
        broadcast: makes scalars the same on all ranks.
    """
    steps = min(steps, like.numel())
    nodes, weights, count = np.zeros((probes, steps)), np.zeros((probes, steps)), 0
    for index in range(probes):
        start = random_vector(like, seed + index)
        values, shares, products = _quadrature(matvec, start, steps, broadcast)
        nodes[index, : len(values)], weights[index, : len(values)] = values, shares
        count += products
    low, high = nodes[weights > 0].min(initial=0.0), nodes[weights > 0].max(initial=0.0)
    extent = float(high - low) or 1.0
    width = extent / 100
    grid = np.linspace(low - 5 * width, high + 5 * width, points)
    curves = np.stack([_smooth(grid, n, w, width) for n, w in zip(nodes, weights, strict=True)])
    cutoff = 1e-4 * max(abs(low), abs(high))
    negative, negative_low, negative_high = _share_below(nodes, weights, -cutoff)
    return Density(
        grid, curves.mean(0), _standard_error(curves), width, nodes, weights,
        negative, negative_low, negative_high, int((nodes < -cutoff).sum(1).max()),
        float(cutoff), count,
    )  # fmt: skip


def _quadrature(
    matvec: Matvec, start: Tensor, steps: int, broadcast: Broadcast
) -> tuple[Floats, Floats, int]:
    """Nodes and weights of one probe vector, and the number of products."""
    space = Subspace(start, steps, broadcast)
    vector = start
    while len(space) < steps:
        direction = space.orthogonal(vector)
        if direction is None:
            break
        vector = matvec(direction)
        if not space.add(direction, vector):
            return np.full(1, math.nan), np.ones(1), len(space) + 1
    values, coefficients = space.ritz()
    return values, coefficients[:, 0].numpy() ** 2, len(space)


def _smooth(grid: Floats, nodes: Floats, weights: Floats, width: float) -> Floats:
    scaled = (grid[:, None] - nodes[None]) / width
    gaussians = np.exp(-0.5 * scaled**2) / (width * math.sqrt(2 * math.pi))
    return np.asarray(gaussians @ weights, dtype=np.float64)


def _standard_error(rows: Floats) -> Any:
    """Standard error of the mean over the first axis; NaN for a single row."""
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
