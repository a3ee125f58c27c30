"""Eigenvalues and spectrum of a model's Hessian over batches, without a run.

    pair = hpc_absa.top_eigenvalue(model, loss_fn, loader, samples=512)
    print(pair.value, pair.error)

Shapes:
    P  parameters that require grad
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from hpc_absa.comm import Communicator, SerialCommunicator, connect
from hpc_absa.curvature import eigen
from hpc_absa.curvature.loss import Loss, mean_and_denominator
from hpc_absa.curvature.operator import HessianOperator, Matrix, evaluation_mode
from hpc_absa.curvature.spectrum import Spectrum
from hpc_absa.curvature.spectrum import spectrum as spectrum_of_sample
from hpc_absa.curvature.stochastic import random_vector

Ranks = Communicator | Literal["world"] | None
"""A communicator, such as `run.comm`; all ranks of the launcher; or this process alone."""


@dataclass(frozen=True)
class TopEigenvalue:
    """The largest eigenvalue of the Hessian of the mean loss."""

    value: float
    """By value, not by magnitude; a Rayleigh quotient, so never above the eigenvalue."""
    error: float
    """Estimated relative error."""
    vector: Tensor
    """[P], unit length; the parameters that require grad, in `model.parameters()` order."""
    matvecs: int
    """Hessian-vector products computed."""
    samples: int
    """Averaged over."""
    converged: bool
    """Whether `error` is at most the tolerance."""


def top_eigenvalue(
    model: nn.Module,
    loss_fn: Loss,
    loader: Iterable[Any],
    *,
    samples: int | None = None,
    tol: float = 1e-2,
    max_iter: int = 60,
    start: Tensor | None = None,
    matrix: Matrix = "hessian",
    comm: Ranks = None,
) -> TopEigenvalue:
    """The largest eigenvalue of the Hessian of the mean loss over a loader's samples, by Lanczos.

    The model is evaluated in evaluation mode and left as it was.

    Args:
        model: called as `model(inputs)`.
        loss_fn: `loss_fn(outputs, targets)`: a mean over the samples, or `(sum, denominator)`.
        loader: batches (inputs, targets) of any kind, such as a `DataLoader`; a batch is
            differentiated at a time.
        samples: stop reading after so many; by default all are used, and kept in memory.
        tol: relative error.
        max_iter: most products.
        start: [P], a vector to start from, such as that of an earlier call.
        matrix: `hessian` or `gauss-newton`.
        comm: ranks to share the batches, each of which must get the same ones.

    Raises:
        CurvatureError: the Hessian cannot be computed; names the remedy.
        ValueError: no batch, or batches that are not pairs.
    """
    communicator = _communicator(comm)
    sample = _Batches(model, loss_fn, loader, samples)
    with evaluation_mode(model, tol):
        operator = _operator(model, sample, communicator, matrix)
        if start is None:
            first = random_vector(operator.gradient(), 0)
        else:  # with noise, as it may be an eigenvector of another eigenvalue
            first = start.to(operator.device, operator.dtype)
            first = eigen.randomized(first, broadcast=communicator.broadcast_)
        result = eigen.lanczos(
            operator.matvec,
            first,
            tol=tol,
            max_iter=max_iter,
            broadcast=communicator.broadcast_,
        )
        operator.close()
    top = result.top
    return TopEigenvalue(
        top.value, top.error, top.vector, result.matvecs, sample.samples, top.converged
    )


def spectrum(
    model: nn.Module,
    loss_fn: Loss,
    loader: Iterable[Any],
    *,
    samples: int | None = None,
    comm: Ranks = None,
    **settings: Any,
) -> Spectrum:
    """Top eigenvalues, trace and spectral density; arguments and errors as of `top_eigenvalue`.

    `settings` are those of `hpc_absa.curvature.spectrum.spectrum`: `k`, `tol`, `max_iter`,
    `trace_matvecs`, `density_steps`, `density_probes`, `layers`, `slice_points`, `matrix`.
    """
    sample = _Batches(model, loss_fn, loader, samples)
    result = spectrum_of_sample(
        model, sample.loss, sample, _communicator(comm), samples=sample.size, microbatch=1,
        **settings,
    )  # fmt: skip
    return dataclasses.replace(result, samples=sample.samples)


def _operator(
    model: nn.Module, sample: _Batches, comm: Communicator, matrix: Matrix
) -> HessianOperator:
    return HessianOperator(
        model, sample.loss, sample, comm, samples=sample.size, microbatch=1, matrix=matrix
    )


class _Batches:
    """The batches of a loader as a sample of the Hessian whose unit is a batch."""

    def __init__(
        self, model: nn.Module, loss_fn: Loss, loader: Iterable[Any], samples: int | None
    ) -> None:
        self._loss_fn, self._device = loss_fn, next(model.parameters()).device
        self._batches: list[tuple[Any, Any]] = []
        self.samples = 0
        for batch in loader:
            if not isinstance(batch, tuple | list) or len(batch) != 2:
                raise ValueError(
                    f"loader: expected batches (inputs, targets), got {type(batch).__name__}"
                )
            self._batches.append((batch[0], batch[1]))
            self.samples += _count(batch)
            if samples is not None and self.samples >= samples:
                break
        if not self._batches:
            raise ValueError("loader: expected at least one batch, got none")

    @property
    def size(self) -> int:
        return len(self._batches)

    def load(self, start: int, stop: int) -> tuple[Any, Any]:
        assert stop == start + 1, "microbatch is 1"
        inputs, targets = tree_map_only(Tensor, lambda t: t.to(self._device), self._batches[start])
        return inputs, targets

    def loss(self, outputs: Any, targets: Any) -> tuple[Tensor, float]:
        """The sum over a batch, and its denominator."""
        count = _count((targets, outputs))
        mean, denominator = mean_and_denominator(self._loss_fn, outputs, targets, count)
        return mean * denominator, denominator


def _count(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor, or of its first list."""
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    return 1


@functools.cache
def _world() -> Communicator:
    return connect()


def _communicator(comm: Ranks) -> Communicator:
    if comm is None:
        return SerialCommunicator()
    return _world() if comm == "world" else comm
