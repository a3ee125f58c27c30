"""The Hessian of the mean loss over a fixed sample as a linear operator over all ranks.

Shapes: P parameters differentiated by, N samples, M microbatches of n_m samples, Σ n_m = N.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from hpc_absa import summation
from hpc_absa.comm import Communicator
from hpc_absa.curvature import fast
from hpc_absa.curvature.graphs import Graph, Loss, Matrix, differentiate, flatten, forward
from hpc_absa.curvature.state import trainable
from hpc_absa.worldsize import share

__all__ = ["HessianOperator", "HessianSample", "Interrupted", "Loss", "Matrix"]


class Interrupted(Exception):  # noqa: N818 - a request, not an error
    """The caller's `poll` asked to give up; nothing was changed."""


class HessianSample(Protocol):
    """Training samples in a fixed order; a smaller sample is a prefix of a larger one."""

    @property
    def size(self) -> int:
        """Samples available."""
        ...

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets at positions [start, stop), un-augmented, on the model's device."""
        ...


class HessianOperator:
    """`v ↦ H v` with `H = Σ_m (n_m / N) ∇²L_m`, every rank over its share of the microbatches.

    A product ends with one sum over the ranks; before it each rank adds up its microbatches in
    float64, so that the result hardly depends on how many ranks there are, and not at all where
    `reproducible`. All ranks must call the methods together. Use it inside `state.observed(model)`.

    Args:
        model: any module; parameters that do not require grad are constants.
        loss_fn: mean loss of a microbatch.
        sample: where microbatches come from.
        comm: the world.
        samples: N, the first samples of `sample`.
        microbatch: samples differentiated at a time, whatever the number of ranks.
        kept: microbatches per rank whose graph stays in memory from product to product; each
            takes about the memory of a training step on it, and saves a gradient per product.
        accelerate: use the faster convolution and normalization of `fast` where they apply.
        matrix: the Hessian, or its Gauss-Newton part.
        names: the parameters to differentiate by, for their own block of the Hessian; all
            trainable ones by default.
        reproducible: sum along the fixed tree of `hpc_absa.summation`: the same bits at any
            power-of-two world size (with one thread a rank, as a kernel's own sums depend on it).
        poll: asked before each product, with the same answer on all ranks; True gives up.

    Raises:
        Interrupted: by a product, when `poll` answered True.
        ValueError: an argument out of range.
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
        kept: int = 2,
        accelerate: bool = True,
        matrix: Matrix = "hessian",
        names: Collection[str] | None = None,
        reproducible: bool = False,
        poll: Callable[[], bool] | None = None,
    ) -> None:
        if not 0 < samples <= sample.size:
            raise ValueError(f"samples: expected 1 to {sample.size} (all there are), got {samples}")
        if microbatch < 1:
            raise ValueError(f"microbatch: expected 1 or more, got {microbatch}")
        if reproducible and not summation.fits(comm.size):
            raise ValueError(
                f"reproducible: expected a power of two of ranks up to {summation.LANES}, "
                f"got {comm.size}"
            )
        self.model, self.loss_fn, self.sample, self.comm = model, loss_fn, sample, comm
        self.samples, self.microbatch = samples, microbatch
        self.microbatches = -(-samples // microbatch)
        self.kept, self.accelerate = kept, accelerate
        self.matrix, self.reproducible, self.poll = matrix, reproducible, poll
        found = trainable(model)
        self.parameters = {n: p for n, p in found.items() if names is None or n in names}
        if not self.parameters:
            raise ValueError(f"names: expected some of the trainable {list(found)}, got {names}")
        self.size = sum(p.numel() for p in self.parameters.values())
        self.matvecs = 0
        every = range(self.microbatches)
        self._lanes = (
            summation.lanes(every, comm.rank, comm.size)
            if reproducible
            else [share(every, comm.rank, comm.size)]
        )
        self._graphs: dict[int, Graph] = {}
        self._plan: fast.Plan | None = None

    @property
    def device(self) -> torch.device:
        """Where the vectors live."""
        return next(iter(self.parameters.values())).device

    @property
    def dtype(self) -> torch.dtype:
        """The vectors' type: the parameters' own."""
        return next(iter(self.parameters.values())).dtype

    def gradient(self) -> Tensor:
        """`∇L` over the sample, flat [P]; kept graphs are built on the way."""
        return self._summed(lambda index: flatten(self._graph(index).gradient))

    def matvec(self, vector: Tensor, against: Sequence[Tensor] = ()) -> tuple[Tensor, Tensor]:
        """`H v`, flat [P], and `uᵀ H_m v` for every microbatch m and u in `against`: [M, len].

        Args:
            vector: [P].
            against: vectors [P] for which the microbatches' own values are wanted.
        """
        if self.poll is not None and self.poll():
            raise Interrupted
        parts = torch.zeros(self.microbatches, len(against), dtype=torch.float64)
        shaped = self._shaped(vector)

        def term(index: int) -> Tensor:
            graph = self._graph(index)
            product = graph.product(shaped, keep=index in self._graphs)
            for column, other in enumerate(against):
                parts[index, column] = float(other @ product)
            return product

        self.matvecs += 1
        return self._summed(term), parts

    def loss(self, offset: Tensor | None = None) -> float:
        """The mean loss over the sample at the parameters plus `offset` [P]."""
        losses = torch.zeros(self.microbatches, dtype=torch.float64)
        shift = self._shaped(torch.zeros(self.size) if offset is None else offset)
        moved = zip(self.parameters.items(), shift, strict=True)
        leaves = {name: (p + s).detach() for (name, p), s in moved}
        with torch.no_grad():
            for index in (index for lane in self._lanes for index in lane):
                inputs, targets = self._load(index)
                mean = self.loss_fn(forward(self.model, inputs, leaves, None), targets)
                losses[index] = float(mean) * self._weight(index)
        return float(self.agree(self.comm.allreduce_(losses)).sum())

    def agree(self, scalars: Tensor) -> Tensor:
        """Rank 0's copy of a small tensor, so that all ranks take the same turns."""
        return self.comm.broadcast_(scalars.contiguous())

    def close(self) -> None:
        """Let go of the kept graphs."""
        self._graphs.clear()

    def _summed(self, term: Callable[[int], Tensor]) -> Tensor:
        """`Σ_m (n_m / N) term(m)` over all ranks, [P]."""
        tree = summation.Tree()
        for lane in self._lanes:
            if not lane:
                tree.add(None)
                continue
            part = self._zeros()
            for index in lane:
                part.add_(term(index), alpha=self._weight(index))
            tree.add(part)
        total = tree.total()
        if total is None:
            total = self._zeros()
        gathered = (
            self.comm.allreduce_recursive_doubling_ if self.reproducible else self.comm.allreduce_
        )
        return gathered(total).to(self.dtype)

    def _span(self, index: int) -> tuple[int, int]:
        start = index * self.microbatch
        return start, min(start + self.microbatch, self.samples)

    def _weight(self, index: int) -> float:
        start, stop = self._span(index)
        return (stop - start) / self.samples

    def _load(self, index: int) -> tuple[Tensor, Tensor]:
        return self.sample.load(*self._span(index))

    def _graph(self, index: int) -> Graph:
        if index in self._graphs:
            return self._graphs[index]
        inputs, targets = self._load(index)
        if self.accelerate and self._plan is None:
            self._plan = fast.plan(self.model, inputs)
        try:
            graph = self._differentiate(inputs, targets)
        except fast.PlanMismatchError:
            self._plan = fast.Plan()
            graph = self._differentiate(inputs, targets)
        if len(self._graphs) < self.kept:
            self._graphs[index] = graph
        return graph

    def _differentiate(self, inputs: Tensor, targets: Tensor) -> Graph:
        return differentiate(
            self.model, self.loss_fn, inputs, targets, self._plan, self.matrix, self.parameters
        )

    def _zeros(self) -> Tensor:
        return torch.zeros(self.size, dtype=torch.float64, device=self.device)

    def _shaped(self, vector: Tensor) -> list[Tensor]:
        parameters = self.parameters.values()
        pieces = vector.to(self.device, self.dtype).split([p.numel() for p in parameters])
        return [
            fast.arranged(piece.view_as(p)) for piece, p in zip(pieces, parameters, strict=True)
        ]
