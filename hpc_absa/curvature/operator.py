"""The Hessian of the mean loss over a fixed sample, as a linear operator over all ranks.

Shapes:
    P    parameters to differentiate by
    N    samples
    M    microbatches
    n_m  samples of microbatch m, Σ n_m = N
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hpc_absa import summation
from hpc_absa.comm import Communicator
from hpc_absa.curvature import fast
from hpc_absa.worldsize import share

Loss = Callable[[Any, Any], Tensor]
"""`loss_fn(outputs, targets)`, a mean over the microbatch."""

Matrix = Literal["hessian", "gauss-newton"]


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """`poll` returned True; nothing was changed."""


class HessianSample(Protocol):
    """Training samples in a fixed order; a smaller sample is a prefix of a larger one."""

    @property
    def size(self) -> int:
        """Number of samples."""
        ...

    def load(self, start: int, stop: int) -> tuple[Any, Any]:
        """Inputs and targets of samples [start, stop), without augmentation, on the model's device.

        The model is called as `model(inputs)`, the loss as `loss_fn(outputs, targets)`.
        """
        ...


class HessianOperator:
    """`v ↦ H v` with `H = Σ_m (n_m / N) ∇²L_m`, where L_m is the mean loss of microbatch m.

    Each rank differentiates its share of the microbatches and adds them in float64; one allreduce
    adds the ranks' sums. All methods are collectives. Use it inside `evaluation_mode(model)`.

    Args:
        model: any module; parameters that do not require grad are constants.
        loss_fn: mean loss of a microbatch.
        sample: the data.
        comm: communicator.
        samples: N, the first samples of `sample`.
        microbatch: samples differentiated at a time, whatever the number of ranks.
        keep_graphs: microbatches per rank whose autograd graph stays in memory between products;
            each takes about the memory of a training step, and saves a gradient per product.
        accelerate: use the convolution and normalization of `fast` where they apply.
        matrix: the Hessian, or its Gauss-Newton part.
        names: parameters to differentiate by, for a diagonal block; all trainable ones by default.
        reproducible: sum in the fixed order of `hpc_absa.summation`: bit for bit the same for any
            power-of-two number of ranks (with one thread per rank, as kernels sum per thread).
        poll: called before each product, with the same result on all ranks; True interrupts.

    Raises:
        Interrupted: by a product, when `poll` returned True.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        sample: HessianSample,
        comm: Communicator,
        *,
        samples: int,
        microbatch: int,
        keep_graphs: int = 2,
        accelerate: bool = True,
        matrix: Matrix = "hessian",
        names: Collection[str] | None = None,
        reproducible: bool = False,
        poll: Callable[[], bool] | None = None,
    ) -> None:
        if not 0 < samples <= sample.size:
            raise ValueError(f"samples: expected 1 to {sample.size}, got {samples}")
        if microbatch < 1:
            raise ValueError(f"microbatch: expected 1 or more, got {microbatch}")
        if reproducible and not summation.fits(comm.size):
            raise ValueError(
                f"reproducible: expected a power of two of ranks up to {summation.LANES}, "
                f"got {comm.size}"
            )
        self.model, self.loss_fn, self.sample, self.comm = model, loss_fn, sample, comm
        self.samples, self.microbatch = samples, microbatch
        self.keep_graphs, self.accelerate, self.matrix = keep_graphs, accelerate, matrix
        self.reproducible, self.poll = reproducible, poll
        trainable = trainable_parameters(model)
        self.parameters = {n: p for n, p in trainable.items() if names is None or n in names}
        if not self.parameters:
            raise ValueError(
                f"names: expected some of the trainable {list(trainable)}, got {names}"
            )
        self.size = sum(p.numel() for p in self.parameters.values())
        like = next(iter(self.parameters.values()))
        self.device, self.dtype = like.device, like.dtype
        starts = range(0, samples, microbatch)
        self.weights = [min(microbatch, samples - start) / samples for start in starts]
        """[M], n_m / N."""
        self.gradients = self.matvecs = 0
        microbatches = range(len(starts))
        self._lanes = (
            summation.lanes(microbatches, comm.rank, comm.size)
            if reproducible
            else [share(microbatches, comm.rank, comm.size)]
        )
        self._graphs: dict[int, _Graph] = {}
        self.plan: fast.Plan | None = None
        """Made on the first microbatch; operators of the same model can share it."""

    @property
    def samples_processed(self) -> int:
        """Samples differentiated so far: once for a gradient, twice for a product."""
        return (self.gradients + 2 * self.matvecs) * self.samples

    def gradient(self) -> Tensor:
        """`∇L` of the sample, [P]."""
        self.gradients += 1
        return self._weighted_sum(lambda index: _flatten(self._graph(index).gradient))

    def matvec(
        self, vector: Tensor, on_microbatch: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        """`H v`, [P].

        Args:
            vector: v, [P].
            on_microbatch: called with m and `∇²L_m v` [P] for each microbatch of this rank.
        """
        if self.poll is not None and self.poll():
            raise Interrupted
        self.matvecs += 1
        shaped = self._shaped(vector)

        def term(index: int) -> Tensor:
            graph = self._graph(index)
            product = graph.product(shaped, index in self._graphs)
            if on_microbatch is not None:
                on_microbatch(index, product)
            return product

        return self._weighted_sum(term)

    def loss(self, offset: Tensor | None = None) -> float:
        """The mean loss of the sample at the parameters plus `offset` [P]."""
        losses = torch.zeros(len(self.weights), dtype=torch.float64)
        shift = self._shaped(torch.zeros(self.size) if offset is None else offset)
        moved = zip(self.parameters.items(), shift, strict=True)
        leaves = {name: (p + s).detach() for (name, p), s in moved}
        with torch.no_grad():
            for index in (index for lane in self._lanes for index in lane):
                inputs, targets = self._load(index)
                outputs = fast.forward(self.model, inputs, leaves, None)
                losses[index] = float(self.loss_fn(outputs, targets)) * self.weights[index]
        return float(self.comm.broadcast_(self.comm.allreduce_(losses)).sum())

    def close(self) -> None:
        """Free the kept graphs."""
        self._graphs.clear()

    def _weighted_sum(self, term: Callable[[int], Tensor]) -> Tensor:
        """`Σ_m (n_m / N) term(m)` over all ranks, [P]."""
        tree = summation.Tree()
        for lane in self._lanes:
            if not lane:
                tree.add(None)
                continue
            part = self._zeros()
            for index in lane:
                part.add_(term(index), alpha=self.weights[index])
            tree.add(part)
        total = tree.total()
        if total is None:
            total = self._zeros()
        if self.reproducible:
            self.comm.allreduce_recursive_doubling_(total)
        else:
            self.comm.allreduce_(total)
        return total.to(self.dtype)

    def _load(self, index: int) -> tuple[Any, Any]:
        start = index * self.microbatch
        return self.sample.load(start, min(start + self.microbatch, self.samples))

    def _graph(self, index: int) -> _Graph:
        if index in self._graphs:
            return self._graphs[index]
        inputs, targets = self._load(index)
        if self.accelerate and self.plan is None:
            self.plan = fast.plan(self.model, inputs)
            self.accelerate = self.plan is not None
        differentiate = _hessian if self.matrix == "hessian" else _gauss_newton
        leaves = {name: fast.leaf(p) for name, p in self.parameters.items()}
        try:
            outputs = fast.forward(self.model, inputs, leaves, self.plan)
        except fast.PlanMismatchError:
            self.plan = fast.Plan()
            outputs = fast.forward(self.model, inputs, leaves, self.plan)
        graph = differentiate(self.loss_fn, outputs, targets, tuple(leaves.values()))
        if len(self._graphs) < self.keep_graphs:
            self._graphs[index] = graph
        return graph

    def _zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=torch.float64, device=self.device)

    def _shaped(self, vector: Tensor) -> list[Tensor]:
        parameters = self.parameters.values()
        pieces = vector.to(self.device, self.dtype).split([p.numel() for p in parameters])
        return [
            fast.arranged(piece.view_as(p)) for piece, p in zip(pieces, parameters, strict=True)
        ]


@dataclass(frozen=True)
class _Graph:
    """A microbatch's gradient and its matrix-vector product; tensors are shaped as parameters."""

    gradient: Sequence[Tensor]
    product: Callable[[Sequence[Tensor], bool], Tensor]
    """`(v, keep) ↦ H_m v`, [P]; unless `keep`, the autograd graph is freed."""


def _hessian(loss_fn: Loss, outputs: Any, targets: Any, leaves: Sequence[Tensor]) -> _Graph:
    """`v ↦ ∇(∇L · v)`."""
    loss = loss_fn(outputs, targets)
    gradient = torch.autograd.grad(loss, leaves, create_graph=True, materialize_grads=True)
    return _Graph(gradient, lambda v, keep: _flatten(_vjp(gradient, leaves, v, keep)))


def _gauss_newton(loss_fn: Loss, outputs: Any, targets: Any, leaves: Sequence[Tensor]) -> _Graph:
    """`v ↦ Jᵀ H_f J v`: J the Jacobian of the outputs f, H_f the Hessian of the loss by f.

    Positive semidefinite for convex losses: the Hessian without the outputs' own curvature
    (Schraudolph 2002, section 3). `J v` is the derivative of `Jᵀ u` by u, multiplied with v.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(f"model: expected one tensor of outputs, got {type(outputs).__name__}")
    detached = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss_fn(detached, targets), detached, create_graph=True)
    u = slope.detach().clone().requires_grad_()
    pulled = torch.autograd.grad(outputs, leaves, u, create_graph=True, materialize_grads=True)

    def product(v: Sequence[Tensor], keep: bool) -> Tensor:
        tangent = _vjp(pulled, (u,), v)
        return _flatten(_vjp((outputs,), leaves, _vjp((slope,), (detached,), tangent), keep))

    return _Graph([p.detach() for p in pulled], product)


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


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require grad, by name, in `model.parameters()` order; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; on exit the training flags and all random states are restored bit for bit.

    Random states are those of Python, NumPy and torch. Parameters, buffers and `.grad` need no
    restoring, because `fast.forward` runs the model on copies.

    Attention uses the only kernel that can be differentiated twice. Recurrent layers do not use
    cuDNN, which cannot differentiate them in evaluation mode.
    """
    flags = [(module, module.training) for module in model.modules()]
    python, numpy_ = random.getstate(), np.random.get_state()
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.enable_grad())
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            for module, _ in flags:
                module.training = False
            yield
        finally:
            for module, training in flags:
                module.training = training
            random.setstate(python)
            np.random.set_state(numpy_)
