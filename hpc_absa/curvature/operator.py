"""The Hessian of the mean loss over a fixed sample, as a linear operator over all ranks.

Shapes:
    P    parameters to differentiate by
    N    samples
    M    microbatches
    n_m  samples of microbatch m, Σ n_m = N
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from itertools import pairwise
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten, tree_unflatten

from hpc_absa import summation
from hpc_absa.comm import Communicator
from hpc_absa.curvature import fast, twice
from hpc_absa.curvature.evaluation import evaluation_mode as evaluation_mode
from hpc_absa.curvature.graphs import Graph, flatten, gauss_newton_graph, hessian_graph
from hpc_absa.curvature.loss import Loss as Loss
from hpc_absa.curvature.loss import check_mean, mean_and_denominator
from hpc_absa.curvature.sampling import Stratum
from hpc_absa.curvature.twice import CurvatureError, Exchange
from hpc_absa.worldsize import share

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

        The model is called as `model(inputs)`, and as `model(*args, **kwargs)` for inputs of the
        type `fast.Arguments`; the loss as `loss_fn(outputs, targets)`. Both get copies.
        """
        ...


class HessianOperator:
    """`v ↦ H v` with `H = Σ_m (d_m / Σ d) ∇²L_m`, where L_m is the mean loss of microbatch m.

    For a mean over samples `d_m = n_m`; for others see `hpc_absa.curvature.loss`. The first product
    checks that the loss is such a mean.

    Each rank differentiates its share of the microbatches and adds them in float64; one allreduce
    adds the ranks' sums. All methods are collectives. Use it inside `evaluation_mode(model)`.

    Args:
        model: any module; parameters that do not require grad are constants.
        loss_fn: mean loss of a microbatch, or `(sum, denominator)`.
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
        strata: of a stratified sample, in its order (`hpc_absa.curvature.stratified`). A microbatch
            has samples of one stratum, and d_m is multiplied by their weight.

    Raises:
        Interrupted: by a product, when `poll` returned True.
        ValueError: an argument is out of range.
        CurvatureError: on all ranks, for a model or loss whose Hessian cannot be computed.
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
        strata: Sequence[Stratum] = (),
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
        twice.require_supported(model)
        trainable = trainable_parameters(model)
        if not trainable:
            raise CurvatureError("model: none of its parameters requires grad, expected some")
        self.parameters = {n: p for n, p in trainable.items() if names is None or n in names}
        if not self.parameters:
            raise ValueError(
                f"names: expected some of the trainable {list(trainable)}, got {names}"
            )
        self.size = sum(p.numel() for p in self.parameters.values())
        parameters = list(self.parameters.values())
        self.device, self.dtype = parameters[0].device, torch.float32  # or float64
        for parameter in parameters:
            self.dtype = torch.promote_types(self.dtype, parameter.dtype)
        equal = uses_batch_statistics(model)
        strata = strata or [Stratum(0, samples, samples)]
        bounds = [(s, b) for s in strata for b in _bounds(s.start, s.stop, microbatch, equal)]
        self.bounds = [bound for _, bound in bounds]
        """[M], first sample of each microbatch and the one after its last."""
        scale = samples / sum(stratum.members for stratum in strata)
        self.factors = [stratum.members / stratum.size * scale for stratum, _ in bounds]
        """[M], the weight of a sample of each microbatch; their mean over the samples is 1."""
        self.denominators = [self.expected_denominator(m) for m in range(len(bounds))]
        """[M], d_m; those of a mean over samples until the first product."""
        self.gradients = self.matvecs = 0
        microbatches = range(len(self.bounds))
        self._lanes = (
            summation.lanes(microbatches, comm.rank, comm.size)
            if reproducible
            else [share(microbatches, comm.rank, comm.size)]
        )
        self._graphs: dict[int, Graph] = {}
        self._denominators: dict[int, float] = {}
        """d_m of this rank's microbatches."""
        self._plain: set[int] = set()
        """Microbatches on which the model does not do what was planned."""
        self._checked: set[int] = set()
        """Microbatches whose loss is known to be a mean."""
        self.plan: fast.Plan | None = None
        """Of the model, after the first product; see `fast.plan_of`."""

    def expected_denominator(self, index: int) -> float:
        """d_m of a mean over samples."""
        start, stop = self.bounds[index]
        return (stop - start) * self.factors[index]

    @property
    def weights(self) -> list[float]:
        """[M], d_m / Σ d; NaN if no microbatch has a loss."""
        total = sum(self.denominators) or math.nan
        return [d / total for d in self.denominators]

    @property
    def samples_processed(self) -> int:
        """Samples differentiated so far: once for a gradient, twice for a product."""
        return (self.gradients + 2 * self.matvecs) * self.samples

    def gradient(self) -> Tensor:
        """`∇L` of the sample, [P]."""
        self.gradients += 1
        return self._weighted_sum(lambda index: flatten(self._graph(index).gradient))

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
        self._prepare()
        shaped = self.shaped(vector)

        def term(index: int) -> Tensor:
            graph = self._graph(index)
            product = graph.product(shaped, index in self._graphs)
            if on_microbatch is not None:
                on_microbatch(index, product)
            return product

        return self._weighted_sum(term)

    def loss(self, offset: Tensor | None = None) -> float:
        """The mean loss of the sample at the parameters plus `offset` [P]."""
        sums = torch.zeros(2, len(self.bounds), dtype=torch.float64)
        shift = self.shaped(torch.zeros(self.size) if offset is None else offset)
        moved = zip(self.parameters.items(), shift, strict=True)
        leaves = {name: (p + s).detach() for (name, p), s in moved}
        with torch.no_grad():
            for index in self.own_microbatches:
                inputs, targets = self.load(index)
                outputs = fast.forward(self.model, inputs, leaves, fast.PLAIN)
                mean, denominator = self.mean(index, outputs, targets)
                if denominator:
                    sums[0, index], sums[1, index] = float(mean) * denominator, denominator
        total, denominator = self.comm.broadcast_(self.comm.allreduce_(sums)).sum(1).tolist()
        return total / denominator if denominator else math.nan

    def close(self) -> None:
        """Free the kept graphs."""
        self._graphs.clear()

    def _weighted_sum(self, term: Callable[[int], Tensor]) -> Tensor:
        """`Σ_m (d_m / Σ d) term(m)` over all ranks, [P].

        The denominators d_m are summed with it. NaN in place of one means that its rank cannot
        differentiate the model.
        """
        self._prepare()
        if len(self.bounds) == self.comm.size == 1:
            value = term(0).to(self.dtype)
            self.denominators = [self._denominators[0]]
            return value if self.denominators[0] else value * math.nan
        tree, error = summation.Tree(), None
        for lane in self._lanes:
            if not lane:
                tree.add(None)
                continue
            part = self._zeros()
            for index in lane:
                try:
                    value = term(index)
                except CurvatureError as caught:
                    part[self.size + index], error = math.nan, caught
                    continue
                denominator = self._denominators[index]
                part[self.size + index] = denominator
                if denominator:
                    part[: self.size].add_(value, alpha=denominator / self.samples)
            tree.add(part)
        total = tree.total()
        if total is None:
            total = self._zeros()
        if self.reproducible:
            self.comm.allreduce_recursive_doubling_(total)
        else:
            self.comm.allreduce_(total)
        self.denominators = total[self.size :].tolist()
        if math.isnan(sum(self.denominators)):
            messages = self.comm.allgather_object(error and str(error))
            raise CurvatureError(next(m for m in messages if m)) from error
        scale = sum(self.denominators) / self.samples
        if scale != 1:
            total /= scale
        return total[: self.size].to(self.dtype)

    @property
    def own_microbatches(self) -> list[int]:
        """Those of this rank."""
        return [index for lane in self._lanes for index in lane]

    def load(self, index: int) -> tuple[Any, Any]:
        """Inputs and targets of a microbatch."""
        return self.sample.load(*self.bounds[index])

    def mean(self, index: int, outputs: Any, targets: Any) -> tuple[Tensor, float]:
        """The loss of a microbatch, and d_m."""
        start, stop = self.bounds[index]
        with Exchange():
            mean, denominator = mean_and_denominator(
                self.loss_fn, outputs, fast.copied(targets), stop - start
            )
        return mean, denominator * self.factors[index]

    def _prepare(self) -> None:
        """The plan is made on the first microbatch, which is the same on all ranks."""
        if not self.accelerate:
            self.plan = fast.PLAIN
        elif self.plan is None:
            self.plan = fast.plan_of(self.model, lambda: self.load(0)[0])

    def _graph(self, index: int) -> Graph:
        if index in self._graphs:
            return self._graphs[index]
        assert self.plan is not None
        inputs, targets = self.load(index)
        graph = None
        if self.plan.accelerate and index not in self._plain:
            try:
                graph = self._differentiated(index, inputs, targets, self.plan)
            except CurvatureError:
                raise
            except Exception:  # also one that the model raises only with the replacements
                graph = None
        if graph is None:
            self._plain.add(index)
            graph = self._differentiated(index, inputs, targets, fast.PLAIN)
            assert graph is not None
        if len(self._graphs) < self.keep_graphs:
            self._graphs[index] = graph
        return graph

    def _differentiated(
        self, index: int, inputs: Any, targets: Any, plan: fast.Plan
    ) -> Graph | None:
        """None if the loss is not finite because of the plan."""
        leaves = {name: fast.leaf(p, plan) for name, p in self.parameters.items()}
        outputs = fast.forward(self.model, inputs, leaves, plan)
        if index not in self._checked:
            start, stop = self.bounds[index]
            check_mean(self.loss_fn, outputs, targets, stop - start)
            self._checked.add(index)

        def mean(outputs: Any) -> Tensor:
            loss, self._denominators[index] = self.mean(index, outputs, targets)
            return loss

        differentiate = hessian_graph if self.matrix == "hessian" else gauss_newton_graph
        graph = differentiate(mean, outputs, tuple(leaves.values()))
        return graph if graph.finite or plan is fast.PLAIN or not plan.folds else None

    def _zeros(self) -> Tensor:
        """[P + M], for the sum and the denominators."""
        size = self.size + len(self.bounds)
        return torch.zeros(size, dtype=torch.float64, device=self.device)

    def shaped(self, vector: Tensor) -> list[Tensor]:
        """A vector [P] as tensors shaped as the parameters."""
        parameters = self.parameters.values()
        pieces = vector.to(self.device, self.dtype).split([p.numel() for p in parameters])
        shaped = [piece.view_as(p).to(p) for piece, p in zip(pieces, parameters, strict=True)]
        channels_last = self.plan is not None and self.plan.channels_last
        return [fast.arranged(piece) for piece in shaped] if channels_last else shaped


def _bounds(start: int, stop: int, microbatch: int, equal: bool) -> list[tuple[int, int]]:
    """Full microbatches and the rest, or `equal` ones, up to one sample."""
    samples = stop - start
    if equal:
        count = -(-samples // microbatch)
        edges = [start + samples * m // count for m in range(count + 1)]
    else:
        edges = [*range(start, stop, microbatch), stop]
    return list(pairwise(edges))


def uses_batch_statistics(model: nn.Module) -> bool:
    """A sample's output depends on its microbatch in evaluation mode as well."""
    return any(
        isinstance(module, _BatchNorm) and module.running_mean is None for module in model.modules()
    )


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that require grad, by name, in `model.parameters()` order; tied ones once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class FunctionModel(nn.Module):
    """A function `function(parameters, inputs)` as a model.

    Args:
        function: any function of torch tensors.
        parameters: tensors in a nested list, tuple or dict. Floating point ones are parameters, in
            this order, others are constants.
    """

    def __init__(self, function: Callable[[Any, Any], Any], parameters: Any) -> None:
        super().__init__()
        tensors, self._structure = tree_flatten(parameters)
        self._function = function
        self._count = len(tensors)
        for index, tensor in enumerate(tensors):
            if tensor.is_floating_point() or tensor.is_complex():
                self.register_parameter(f"parameter{index}", nn.Parameter(tensor.detach()))
            else:
                self.register_buffer(f"parameter{index}", tensor)

    def forward(self, inputs: Any) -> Any:
        tensors = [getattr(self, f"parameter{index}") for index in range(self._count)]
        return self._function(tree_unflatten(tensors, self._structure), inputs)
