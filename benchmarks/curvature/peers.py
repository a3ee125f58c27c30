"""λ by PyHessian, hessian-eigenthings and curvlinops, each as its documentation uses it.

A transformer runs with the attention kernel and without the fast path that cannot be differentiated
twice, which the peers leave to the user.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.curvature.networks import Samples


@contextmanager
def differentiable() -> Iterator[None]:
    """What a user of a peer must do for a transformer; peers' warnings are not shown."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stdout(io.StringIO()):
                yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def pyhessian(model: nn.Module, sample: Samples, tol: float) -> float:
    """Power iteration on the whole batch, whose graph is kept."""
    from pyhessian import hessian

    data = (sample.inputs, sample.targets)
    with differentiable():
        peer = hessian(
            model, functional.cross_entropy, data=data, cuda=sample.inputs.device.type == "cuda"
        )
        values, _ = peer.eigenvalues(maxIter=100, tol=tol, top_n=1)
    model.zero_grad(set_to_none=True)
    return float(values[0])


def eigenthings(model: nn.Module, sample: Samples, products: int) -> float:
    """Lanczos with a fixed number of products."""
    from hessian_eigenthings.algorithms.lanczos import lanczos
    from hessian_eigenthings.loss_fns import supervised_loss
    from hessian_eigenthings.operators.hessian import HessianOperator

    with differentiable():
        loss = supervised_loss(functional.cross_entropy)
        operator = HessianOperator(model, [(sample.inputs, sample.targets)], loss)
        result = lanczos(operator, k=1, max_iter=products, tol=1e-2, which="LA", seed=0)
    return float(result.eigenvalues[0])


def curvlinops_operator(model: nn.Module, sample: Samples, batch: int):
    """curvlinops' Hessian over batches."""
    from curvlinops import HessianLinearOperator

    data = [sample.load(first, first + batch) for first in range(0, sample.size, batch)]
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    loss = nn.CrossEntropyLoss()
    try:
        return HessianLinearOperator(model, loss, parameters, data, check_deterministic=False)
    except (TypeError, ValueError, AttributeError):  # versions that take a list
        values = list(parameters.values())
        return HessianLinearOperator(model, loss, values, data, check_deterministic=False)


def curvlinops(model: nn.Module, sample: Samples, tol: float, basis: int | None = None) -> float:
    """ARPACK's Lanczos on curvlinops' Hessian, with a basis of its default size or a smaller."""
    from scipy.sparse.linalg import eigsh

    with differentiable():
        operator = curvlinops_operator(model, sample, 128).to_scipy()
        values = eigsh(operator, k=1, which="LA", tol=tol, ncv=basis, return_eigenvectors=False)
    return float(np.max(values))


def curvlinops_product(
    model: nn.Module, sample: Samples, compiled: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """One product, eager or by `torch.compile`."""
    operator = curvlinops_operator(model, sample, 128)

    def product(vector: torch.Tensor) -> torch.Tensor:
        with differentiable():
            return operator @ vector

    if not compiled:
        return product
    from torch.func import functional_call, grad, jvp

    parameters = dict(model.named_parameters())
    names, sizes = list(parameters), [p.numel() for p in parameters.values()]

    def loss(values: tuple[torch.Tensor, ...], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(
            functional_call(model, dict(zip(names, values, strict=True)), (x,)), y
        )

    def forward_over_reverse(values, tangents, x, y):  # what curvlinops computes
        return jvp(lambda *v: grad(loss)(v, x, y), values, tangents)[1]

    run = torch.compile(forward_over_reverse)

    def compiled_product(vector: torch.Tensor) -> torch.Tensor:
        values = tuple(p.detach() for p in parameters.values())
        pieces = vector.split(sizes)
        tangents = tuple(v.view_as(p) for v, p in zip(pieces, values, strict=True))
        total = torch.zeros_like(vector)
        with differentiable():
            for first in range(0, sample.size, 128):
                x, y = sample.load(first, first + 128)
                parts = run(values, tangents, x, y)
                total += torch.cat([p.reshape(-1) for p in parts]) * (len(x) / sample.size)
        return total

    return compiled_product
