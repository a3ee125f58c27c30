"""The whole spectrum of the Hessian, for people: top eigenvalues, trace, density, directions.

Shapes: P trainable parameters, k eigenpairs, m Lanczos steps, s probe vectors, G grid points.
Everything works on any symmetric product and, through `HessianOperator`, over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpc_absa.comm import Communicator
from hpc_absa.curvature import eigen
from hpc_absa.curvature.operator import HessianOperator, HessianSample, Loss, Matrix
from hpc_absa.curvature.state import observed, trainable
from hpc_absa.curvature.subspace import Agree, Subspace, dots
from hpc_absa.curvature.surface import Slice, slices

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TopEigenvalues:
    """The k largest eigenvalues by value with their evidence."""

    values: Floats
    """[k], largest first."""
    residuals: Floats
    """[k], `‖Hv − λv‖ / |λ|`."""
    errors: Floats
    """[k], estimated relative errors."""
    converged: NDArray[np.bool_]
    """[k]."""
    vectors: NDArray[np.float32]
    """[k, P], unit rows; parameters in `model.parameters()` order."""
    lowest: float
    """Smallest Ritz value seen; negative at a saddle."""
    matvecs: int


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
    negative_error: float
    cutoff: float
    """Below it a value is not told from zero."""
    matvecs: int


@dataclass(frozen=True)
class Layer:
    """One parameter tensor's own block of the Hessian."""

    name: str
    parameters: int
    top: float
    residual: float
    converged: bool
    trace: float
    trace_error: float


@dataclass(frozen=True)
class Spectrum:
    """What `hpc-absa spectrum` shows."""

    samples: int
    parameters: int
    loss: float
    top: TopEigenvalues
    trace: Trace
    density: Density
    layers: tuple[Layer, ...]
    slices: tuple[Slice, ...]
    """The loss along the top eigenvectors."""


def spectrum(
    model: nn.Module,
    loss_fn: Loss,
    sample: HessianSample,
    comm: Communicator,
    *,
    samples: int,
    microbatch: int,
    k: int = 5,
    tol: float = 1e-2,
    max_iter: int = 60,
    trace_matvecs: int = 30,
    density_steps: int = 40,
    density_probes: int = 4,
    layers: bool = True,
    slice_points: int = 21,
    kept: int = 2,
    matrix: Matrix = "hessian",
    poll: Callable[[], bool] | None = None,
    progress: Callable[[str, int], None] = lambda part, products: None,
) -> Spectrum:
    """Everything about the Hessian of the mean loss over the first `samples`, same on all ranks.

    The model is looked at in evaluation mode and left bit for bit as it was.

    Args:
        model: on the device the sample loads to.
        loss_fn: mean loss of a microbatch.
        sample: training samples in a fixed order.
        comm: the world; all ranks call together.
        samples: the Hessian's.
        microbatch: samples differentiated at a time.
        k: eigenpairs.
        tol: their relative error.
        max_iter: products for them at most.
        trace_matvecs: products for the trace, a third of them for the sketch.
        density_steps: m, products per probe vector.
        density_probes: s.
        layers: also each parameter tensor's own block.
        slice_points: loss evaluations along each of the top two eigenvectors; 0 for none.
        kept: microbatches whose graph is kept, see `HessianOperator`.
        matrix: `hessian` or `gauss-newton`.
        poll: asked between products, the same answer on all ranks; True raises.
        progress: told before each product which part it is for, and how many there were so far.

    Raises:
        Interrupted: `poll` answered True.
    """
    part = ""
    with observed(model):
        operator = HessianOperator(
            model, loss_fn, sample, comm, samples=samples, microbatch=microbatch,
            kept=kept, matrix=matrix, poll=poll,
        )  # fmt: skip

        def product(vector: Tensor) -> Tensor:
            progress(part, operator.matvecs)
            return operator.matvec(vector)[0]

        like, agree = operator.gradient(), operator.agree
        part = "top eigenvalues"
        top = top_eigenvalues(product, like, k=k, tol=tol, max_iter=max_iter, agree=agree)
        part = "trace"
        trace = hutch(product, like, matvecs=trace_matvecs, agree=agree)
        part = "density"
        density = quadrature(product, like, steps=density_steps, probes=density_probes, agree=agree)
        progress("layers", operator.matvecs)
        blocks = tuple(_layer(operator, name, tol) for name in trainable(model)) if layers else ()
        loss = operator.loss()
        lines = slices(operator, top.vectors[:2], top.values[:2], slice_points)
    return Spectrum(samples, operator.size, loss, top, trace, density, blocks, lines)


def top_eigenvalues(
    matvec: eigen.Matvec,
    start: Tensor,
    *,
    k: int,
    tol: float,
    max_iter: int,
    agree: Agree = lambda scalars: scalars,
) -> TopEigenvalues:
    """The k largest by value (`eigen.lanczos` from `start`, which may be zero)."""
    starts = [start, random_vector(start, 0)]
    found = eigen.lanczos(matvec, starts, tol=tol, max_iter=max_iter, k=k, agree=agree)
    pairs = found.pairs
    return TopEigenvalues(
        np.array([pair.value for pair in pairs]),
        np.array([pair.residual for pair in pairs]),
        np.array([pair.error for pair in pairs]),
        np.array([pair.converged for pair in pairs]),
        torch.stack([pair.vector for pair in pairs]).float().cpu().numpy(),
        found.lowest,
        found.matvecs,
    )


def hutch(
    matvec: eigen.Matvec,
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
    matvec: eigen.Matvec,
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
    below = (weights * (nodes < -cutoff)).sum(1)
    return Density(
        grid, curves.mean(0), _standard_error(curves), width, nodes, weights,
        float(below.mean()), float(_standard_error(below)), float(cutoff), spent,
    )  # fmt: skip


def _nodes(
    matvec: eigen.Matvec, start: Tensor, steps: int, agree: Agree
) -> tuple[Floats, Floats, int]:
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


def _layer(operator: HessianOperator, name: str, tol: float) -> Layer:
    """Top eigenvalue and trace of one parameter's diagonal block."""
    inside = operator.span(name)

    def product(vector: Tensor) -> Tensor:
        whole = torch.zeros(operator.size, dtype=vector.dtype, device=vector.device)
        whole[inside] = vector
        return operator.matvec(whole)[0][inside].clone()

    start = random_vector(operator.vector()[inside], 0)
    limit = min(10, start.numel())
    found = eigen.lanczos(product, [start], tol=tol, max_iter=limit, agree=operator.agree)
    trace = hutch(product, start, matvecs=9, agree=operator.agree)
    top = found.top
    return Layer(
        name, start.numel(), top.value, top.residual, top.converged, trace.value, trace.error
    )


def random_vector(like: Tensor, seed: int) -> Tensor:
    """Standard normal [P], the same on every rank and device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.numel(), generator=generator, dtype=torch.float64).to(like)


def random_signs(like: Tensor, seed: int) -> Tensor:
    """±1 [P], the same on every rank and device."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 2, (like.numel(),), generator=generator, dtype=torch.int8)
    return (2 * bits - 1).to(like)


def to_dict(record: Any, *, vectors: bool = False) -> Any:
    """A record as what JSON can say: arrays as lists, NaN as None, vectors [k, P] only if asked."""
    if is_dataclass(record):
        kept = [f.name for f in fields(record) if vectors or f.name != "vectors"]
        return {name: to_dict(getattr(record, name), vectors=vectors) for name in kept}
    if isinstance(record, np.ndarray):
        return to_dict(record.tolist(), vectors=vectors)
    if isinstance(record, Sequence) and not isinstance(record, str):
        return [to_dict(item, vectors=vectors) for item in record]
    if isinstance(record, float) and not math.isfinite(record):
        return None
    return record


def save(found: Spectrum, path: Path) -> None:
    """All of it as HDF5: a group a record, a dataset an array, an attribute a number."""
    import h5py

    with h5py.File(path, "w") as file:
        _write(file, found)


def _write(group: Any, record: Any) -> None:
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, np.ndarray):
            group[item.name] = value
        elif is_dataclass(value):
            _write(group.create_group(item.name), value)
        elif isinstance(value, tuple):
            for index, part in enumerate(value):
                _write(group.create_group(f"{item.name}/{index:04d}"), part)
        else:
            group.attrs[item.name] = value
