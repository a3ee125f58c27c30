"""The whole spectrum of the Hessian, for people: top eigenvalues, trace, density, directions.

Shapes: P trainable parameters, k eigenpairs.
Everything works on any symmetric product and, through `HessianOperator`, over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpc_absa.comm import Communicator
from hpc_absa.curvature import eigen
from hpc_absa.curvature.operator import HessianOperator, HessianSample, Loss, Matrix
from hpc_absa.curvature.state import observed, trainable
from hpc_absa.curvature.stochastic import (
    Density,
    Floats,
    Trace,
    hutch,
    quadrature,
    random_vector,
)
from hpc_absa.curvature.subspace import Agree
from hpc_absa.curvature.surface import Slice, slices


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
class Layer:
    """One parameter tensor's own block of the Hessian."""

    name: str
    parameters: int
    top: float
    residual: float
    converged: bool
    trace: Trace
    density: Density


@dataclass(frozen=True)
class Spectrum:
    """What `hpc-absa spectrum` shows."""

    matrix: Matrix
    samples: int
    parameters: int
    loss: float
    top: TopEigenvalues
    trace: Trace
    density: Density
    layers: tuple[Layer, ...]
    slices: tuple[Slice, ...]
    """The loss along the top eigenvectors."""

    @property
    def lowest(self) -> float:
        """Smallest Ritz value seen anywhere: an upper bound of the smallest eigenvalue."""
        used = self.density.nodes[self.density.weights > 0]
        return min(self.top.lowest, float(used.min(initial=math.inf)))


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

        def over(names: Sequence[str] | None) -> HessianOperator:
            return HessianOperator(
                model, loss_fn, sample, comm, samples=samples, microbatch=microbatch,
                kept=kept, matrix=matrix, names=names, poll=poll,
            )  # fmt: skip

        operator = over(None)

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
        loss = operator.loss()
        lines = slices(operator, top.vectors[:2], top.values[:2], slice_points)
        operator.close()
        blocks = []
        for name in trainable(model) if layers else ():
            progress(name, operator.matvecs)
            blocks.append(_layer(over([name]), name, tol))
    return Spectrum(matrix, samples, operator.size, loss, top, trace, density, tuple(blocks), lines)


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


def _layer(operator: HessianOperator, name: str, tol: float) -> Layer:
    """Top eigenvalue, trace and density of one parameter's diagonal block."""

    def product(vector: Tensor) -> Tensor:
        return operator.matvec(vector)[0]

    agree = operator.agree
    like = operator.gradient()
    start, limit = random_vector(like, 0), min(10, operator.size)
    top = eigen.lanczos(product, [start], tol=tol, max_iter=limit, agree=agree).top
    trace = hutch(product, like, matvecs=9, agree=agree)
    density = quadrature(product, like, steps=8, probes=2, points=80, agree=agree)
    return Layer(name, operator.size, top.value, top.residual, top.converged, trace, density)
