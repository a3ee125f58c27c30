"""A microbatch's gradient and the autograd graph that multiplies with its Hessian.

`P` is the number of parameters to differentiate by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hpc_absa.curvature import twice
from hpc_absa.curvature.twice import CurvatureError


@dataclass(frozen=True)
class Graph:
    """A microbatch's gradient and its matrix-vector product; tensors are shaped as parameters."""

    gradient: Sequence[Tensor]
    product: Callable[[Sequence[Tensor], bool], Tensor]
    """`(v, keep) ↦ H_m v`, [P]; unless `keep`, the autograd graph is freed."""
    finite: bool
    """The loss is finite."""


def hessian_graph(mean: Callable[[Any], Tensor], outputs: Any, leaves: Sequence[Tensor]) -> Graph:
    """`v ↦ ∇(∇L · v)`."""
    loss = mean(outputs)
    with twice.named_errors(loss):
        gradient = _gradients(loss, leaves)
    twice.require_twice_differentiable(loss, gradient)

    def product(v: Sequence[Tensor], keep: bool) -> Tensor:
        with twice.named_errors(loss):
            return flatten(_vjp(gradient, leaves, v, keep))

    return Graph(gradient, product, bool(loss.isfinite()))


def gauss_newton_graph(
    mean: Callable[[Any], Tensor], outputs: Any, leaves: Sequence[Tensor]
) -> Graph:
    """`v ↦ Jᵀ H_f J v`: J the Jacobian of the outputs f, H_f the Hessian of the loss by f.

    Positive semidefinite for convex losses: the Hessian without the outputs' own curvature
    (Schraudolph 2002, section 3). `J v` is the derivative of `Jᵀ u` by u, multiplied with v.
    """
    if not isinstance(outputs, Tensor):
        raise CurvatureError(
            f"model: expected one tensor of outputs, got {type(outputs).__name__}; the "
            "Gauss-Newton matrix needs the loss as a function of one tensor"
        )
    detached = outputs.detach().requires_grad_()
    loss = mean(detached)
    (slope,) = _gradients(loss, (detached,))
    if not outputs.requires_grad:
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        return Graph(zeros, lambda v, keep: flatten(zeros), bool(loss.isfinite()))
    u = slope.detach().clone().requires_grad_()
    with twice.named_errors(outputs):
        pulled = torch.autograd.grad(outputs, leaves, u, create_graph=True, materialize_grads=True)
    twice.require_twice_differentiable(loss, [slope])
    twice.require_twice_differentiable(outputs, pulled)

    def product(v: Sequence[Tensor], keep: bool) -> Tensor:
        with twice.named_errors(outputs):
            tangent = _vjp(pulled, (u,), v)
            return flatten(_vjp((outputs,), leaves, _vjp((slope,), (detached,), tangent), keep))

    return Graph([p.detach() for p in pulled], product, bool(loss.isfinite()))


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Differentiable; zero if the loss does not depend on the inputs."""
    if not loss.requires_grad:
        return [torch.zeros_like(i) for i in inputs]
    return torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)


def _vjp(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    keep: bool = True,
) -> Sequence[Tensor]:
    """`torch.autograd.grad` that allows outputs, and inputs, on which nothing depends."""
    used = [(o, c) for o, c in zip(outputs, cotangents, strict=True) if o.requires_grad]
    if not used:
        return [torch.zeros_like(i) for i in inputs]
    tensors, vectors = zip(*used, strict=True)
    return torch.autograd.grad(tensors, inputs, vectors, retain_graph=keep, materialize_grads=True)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1).to(tensors[0].device) for t in tensors])
