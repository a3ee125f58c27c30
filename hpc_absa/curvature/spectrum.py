"""The spectrum of the Hessian: top eigenvalues, trace, density, layers, loss along eigenvectors.

Shapes:
    P  trainable parameters
    k  eigenpairs
    n  points of a slice
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpc_absa.comm import Communicator
from hpc_absa.curvature import eigen
from hpc_absa.curvature.eigen import Floats
from hpc_absa.curvature.leading import leading
from hpc_absa.curvature.operator import (
    HessianOperator,
    HessianSample,
    Loss,
    Matrix,
    evaluation_mode,
    trainable_parameters,
)
from hpc_absa.curvature.stochastic import (
    Density,
    Trace,
    hutchpp_trace,
    random_vector,
    spectral_density,
)
from hpc_absa.errors import UsageError


@dataclass(frozen=True)
class TopEigenvalues:
    """The k largest eigenvalues by value."""

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
    """Smallest Ritz value; negative at a saddle."""
    matvecs: int


@dataclass(frozen=True)
class Layer:
    """The diagonal block of the Hessian of one parameter tensor."""

    name: str
    parameters: int
    top: float
    residual: float
    converged: bool
    trace: Trace
    density: Density


@dataclass(frozen=True)
class Slice:
    """`L(w + t v)` for a unit vector v."""

    distances: Floats
    """[n], t, in units of the weights."""
    losses: Floats
    """[n], the mean loss over the sample."""
    eigenvalue: float
    """λ along v: compare with the parabola `L(w) + t ∇L·v + λ t² / 2`."""


@dataclass(frozen=True)
class Spectrum:
    """Result of `spectrum`."""

    matrix: Matrix
    samples: int
    parameters: int
    loss: float
    top: TopEigenvalues
    trace: Trace
    density: Density
    layers: tuple[Layer, ...]
    slices: tuple[Slice, ...]
    """The loss along the top two eigenvectors."""

    @property
    def lowest(self) -> float:
        """Smallest Ritz value: an upper bound of the smallest eigenvalue."""
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
    matrix: Matrix = "hessian",
    poll: Callable[[], bool] | None = None,
    progress: Callable[[str, int], None] = lambda part, matvecs: None,
) -> Spectrum:
    """The spectrum of the Hessian of the mean loss over the first `samples`, same on all ranks.

    A collective. The model is evaluated in evaluation mode and left bit for bit as it was.

    Args:
        model: on the device the sample loads to.
        loss_fn: mean loss of a microbatch.
        sample: training samples in a fixed order.
        comm: communicator.
        samples: number of samples the loss is averaged over.
        microbatch: samples differentiated at a time.
        k: eigenpairs.
        tol: relative error of the eigenvalues.
        max_iter: maximum number of products for the eigenvalues.
        trace_matvecs: products for the trace, a third of them for the sketch.
        density_steps: products per probe vector of the density.
        density_probes: probe vectors of the density.
        layers: also the diagonal block of each parameter tensor.
        slice_points: loss evaluations along each of the top two eigenvectors; 0 for none.
        matrix: `hessian` or `gauss-newton`.
        poll: called before each product, with the same result on all ranks; True interrupts.
        progress: called before each product of the whole matrix and each layer, with the name of
            the part and the number of products so far.

    Raises:
        Interrupted: `poll` returned True.
        UsageError: more eigenpairs than products.
    """
    if k > max_iter:
        raise UsageError(f"k = {k}: expected at most max_iter = {max_iter} eigenvalues")
    part = ""
    with evaluation_mode(model, tol):

        def block(names: Collection[str] | None) -> HessianOperator:
            return HessianOperator(
                model, loss_fn, sample, comm, samples=samples, microbatch=microbatch,
                matrix=matrix, names=names, poll=poll,
            )  # fmt: skip

        operator, broadcast = block(None), comm.broadcast_

        def matvec(vector: Tensor) -> Tensor:
            progress(part, operator.matvecs)
            return operator.matvec(vector)

        gradient = operator.gradient()
        part = "top eigenvalues"
        top = _top_eigenvalues(matvec, gradient, k, tol, max_iter, broadcast)
        part = "trace"
        trace = hutchpp_trace(matvec, gradient, matvecs=trace_matvecs, broadcast=broadcast)
        part = "density"
        density = spectral_density(
            matvec, gradient, steps=density_steps, probes=density_probes, broadcast=broadcast
        )
        loss = operator.loss()
        lines = _slices(operator, top, slice_points)
        operator.close()
        blocks = []
        for name in trainable_parameters(model) if layers else ():
            progress(name, operator.matvecs)
            blocks.append(_layer(block([name]), name, tol))
    return Spectrum(matrix, samples, operator.size, loss, top, trace, density, tuple(blocks), lines)


def _top_eigenvalues(
    matvec: eigen.Matvec,
    gradient: Tensor,
    k: int,
    tol: float,
    max_iter: int,
    broadcast: eigen.Broadcast,
) -> TopEigenvalues:
    starts = [gradient, random_vector(gradient, 0)]
    result = leading(matvec, starts, tol=tol, max_iter=max_iter, k=k, broadcast=broadcast)
    return TopEigenvalues(
        np.array([pair.value for pair in result.pairs]),
        np.array([pair.residual for pair in result.pairs]),
        np.array([pair.error for pair in result.pairs]),
        np.array([pair.converged for pair in result.pairs]),
        torch.stack([pair.vector for pair in result.pairs]).float().cpu().numpy(),
        result.lowest,
        result.matvecs,
    )


def _layer(operator: HessianOperator, name: str, tol: float) -> Layer:
    matvec, broadcast = operator.matvec, operator.comm.broadcast_
    gradient = operator.gradient()
    start = random_vector(gradient, 0)
    top = eigen.lanczos(matvec, start, tol=tol, max_iter=10, broadcast=broadcast).top
    trace = hutchpp_trace(matvec, gradient, matvecs=9, broadcast=broadcast)
    density = spectral_density(matvec, gradient, steps=8, probes=2, points=80, broadcast=broadcast)
    return Layer(name, operator.size, top.value, top.residual, top.converged, trace, density)


def _slices(operator: HessianOperator, top: TopEigenvalues, points: int) -> tuple[Slice, ...]:
    """The loss along the top two eigenvectors.

    Distances reach to where a parabola with the eigenvalue as curvature has risen by 1 (in units of
    the loss), so that sharp and flat directions fill the same plot.
    """
    values = top.values[:2]
    if points < 2 or not np.isfinite(values).all():
        return ()
    lines = []
    for vector, value in zip(top.vectors[:2], values, strict=True):
        reach = min((2 / max(abs(float(value)), 1e-12)) ** 0.5, 1e3)
        distances = np.linspace(-reach, reach, points)
        direction = torch.from_numpy(vector)
        losses = [operator.loss(direction * float(distance)) for distance in distances]
        lines.append(Slice(distances, np.array(losses), float(value)))
    return tuple(lines)
