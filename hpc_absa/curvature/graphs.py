"""One microbatch differentiated once, ready to be multiplied with vectors.

Shapes: P parameters differentiated by; tensors "shaped as leaves" have the parameters' shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hpc_absa.curvature import fast

Loss = Callable[[Tensor, Tensor], Tensor]
"""`loss_fn(outputs, targets)`, a mean over the microbatch."""

Matrix = Literal["hessian", "gauss-newton"]


class Graph(Protocol):
    """What an operator needs of a microbatch."""

    @property
    def gradient(self) -> tuple[Tensor, ...]:
        """`∇L`, shaped as leaves."""
        ...

    def product(self, vector: Sequence[Tensor], *, keep: bool) -> Tensor:
        """The microbatch's matrix times `vector` (shaped as leaves), flat [P].

        With `keep` the graph can be used again.
        """
        ...


@dataclass(frozen=True)
class HessianGraph:
    """`v ↦ ∇(∇L · v)`."""

    leaves: tuple[Tensor, ...]
    gradient: tuple[Tensor, ...]

    def product(self, vector: Sequence[Tensor], *, keep: bool) -> Tensor:
        """The derivative of the gradient's graph: two gradients' work."""
        used = [(g, v) for g, v in zip(self.gradient, vector, strict=True) if g.requires_grad]
        if not used:
            return flatten([torch.zeros_like(leaf) for leaf in self.leaves])
        outputs, weights = zip(*used, strict=True)
        return flatten(
            torch.autograd.grad(
                outputs, self.leaves, weights, retain_graph=keep, materialize_grads=True
            )
        )


@dataclass(frozen=True)
class GaussNewtonGraph:
    """`v ↦ Jᵀ H_f J v`: J the outputs' Jacobian, H_f the loss's Hessian by the outputs.

    Positive semidefinite for convex losses: the Hessian without the outputs' own curvature
    (Schraudolph 2002, section 3).
    """

    leaves: tuple[Tensor, ...]
    gradient: tuple[Tensor, ...]
    outputs: Tensor
    cotangent: Tensor
    pulled: tuple[Tensor, ...]
    """`Jᵀ cotangent`, whose derivative by `cotangent` is J."""
    free: Tensor
    """The outputs, cut off from the model."""
    slope: Tensor
    """The loss's gradient by `free`."""

    def product(self, vector: Sequence[Tensor], *, keep: bool) -> Tensor:
        """J by differentiating `Jᵀu` by u, then H_f, then Jᵀ."""
        tangent = _derivative(self.pulled, self.cotangent, vector)
        bent = _derivative((self.slope,), self.free, (tangent,))
        product = torch.autograd.grad(
            self.outputs, self.leaves, bent, retain_graph=keep, materialize_grads=True
        )
        return flatten(product)


def _derivative(outputs: Sequence[Tensor], by: Tensor, weights: Sequence[Tensor]) -> Tensor:
    used = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    if not used:
        return torch.zeros_like(by)
    tensors, vectors = zip(*used, strict=True)
    (found,) = torch.autograd.grad(tensors, by, vectors, retain_graph=True, materialize_grads=True)
    return found


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """One vector [P] from tensors shaped as leaves."""
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def differentiate(
    model: nn.Module,
    loss_fn: Loss,
    inputs: Tensor,
    targets: Tensor,
    plan: fast.Plan | None,
    matrix: Matrix,
    parameters: Mapping[str, nn.Parameter],
) -> Graph:
    """`∇L` by `parameters`, with the graph that leads to it."""
    leaves = {name: fast.leaf(p) for name, p in parameters.items()}
    outputs = forward(model, inputs, leaves, plan)
    wanted = tuple(leaves.values())
    if matrix == "hessian":
        loss = loss_fn(outputs, targets)
        gradient = torch.autograd.grad(loss, wanted, create_graph=True, materialize_grads=True)
        return HessianGraph(wanted, gradient)
    free = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss_fn(free, targets), free, create_graph=True)
    cotangent = slope.detach().clone().requires_grad_()
    pulled = torch.autograd.grad(
        outputs, wanted, cotangent, create_graph=True, materialize_grads=True
    )
    gradient = tuple(p.detach() for p in pulled)
    return GaussNewtonGraph(wanted, gradient, outputs, cotangent, pulled, free, slope)


def forward(
    model: nn.Module, inputs: Tensor, leaves: dict[str, Tensor], plan: fast.Plan | None
) -> Tensor:
    """The outputs with `leaves` in their parameters' places; the other parameters are constants.

    The model runs on tensors of our own, so that no hook on a parameter fires and a buffer that a
    module writes to in evaluation mode is thrown away.
    """
    fixed = {n: p.detach() for n, p in model.named_parameters() if n not in leaves}
    copies = {name: b.clone() for name, b in model.named_buffers()}
    tensors = {**leaves, **fixed, **copies}
    with fast.products(plan, tensors):
        outputs = functional_call(model, tensors, (fast.arranged(inputs),))
    if not isinstance(outputs, Tensor):
        raise TypeError(f"model: expected one tensor of outputs, got {type(outputs).__name__}")
    return outputs
