"""The Hessians of a sample and of its parts, and how many samples are differentiated at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hpc_absa.comm import Communicator
from hpc_absa.curvature import eigen, fast
from hpc_absa.curvature.operator import (
    HessianOperator,
    HessianSample,
    Loss,
    trainable_parameters,
    uses_batch_statistics,
)
from hpc_absa.curvature.sampling import Scatter, Stratum

PIECE_BYTES = 128 << 20
"""Activations of the samples that a CPU differentiates at a time: 64 for a ResNet-20, where a
product takes 10 % less time than by 128 (`benchmarks/curvature.md`); a perceptron's whole batch."""
SMALL_BYTES = 32 << 20
"""Pieces have as many activations, also if that is more than a microbatch, where the ranks do not
then run out of work: small pieces take up to twice as long for the same samples."""
KEEP_BYTES = 64 << 20
"""Activations whose graphs are always kept; a graph takes some four times as much."""
GPU_SHARE = 16
"""The same limit on a GPU, for pieces and kept graphs: this part of its memory. There small pieces
take almost as long as large ones, because launching a kernel takes longer than its arithmetic."""
COARSE_BYTES = 8 << 20
"""Activations of the coarse sample from which a coarse search, and tests on it, pay: below, as on a
GPU, small pieces take as long as large ones."""
COARSE_FRACTION = 8
"""The search starts on this part of the sample, where a product costs as much less."""
COARSE_SAMPLES = 16
"""The smallest coarse sample: the Hessian of fewer differs too much from the whole sample's."""


@dataclass(frozen=True)
class Pieces:
    """How many samples are differentiated at a time, and kept."""

    whole: int
    """Samples of a piece of the whole sample."""
    coarse: int
    """Samples of a piece of the coarse sample."""
    coarse_samples: int
    """0: the search starts on the whole sample."""
    kept: int
    """Samples per rank whose graphs are kept."""
    small_kernels: bool
    """Starting a kernel takes about as long as its arithmetic: a part of the sample takes almost as
    long as the whole, so nothing is tested on parts."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        sample: HessianSample,
        comm: Communicator,
        samples: int,
        microbatch: int,
        keep_samples: int | None,
        reproducible: bool,
    ) -> Pieces:
        """With `reproducible`, whatever the number of ranks."""
        if microbatch < 1:
            raise ValueError(f"microbatch: expected 1 or more, got {microbatch}")
        size = activation_bytes(model, sample, microbatch)
        device, share = next(model.parameters()).device, -(-samples // comm.size)
        on_cpu = device.type == "cpu"
        memory = KEEP_BYTES if on_cpu else _gpu_bytes(device, comm) // GPU_SHARE
        kept = keep_samples
        if kept is None:
            kept = max(3 * microbatch // 2, memory // size)
        coarse_samples = min(samples, max(COARSE_SAMPLES, samples // COARSE_FRACTION))
        if uses_batch_statistics(model):  # the Hessian depends on the piece: it is training's
            return cls(microbatch, microbatch, max(coarse_samples, microbatch), kept, True)
        piece = min(microbatch, max(1, PIECE_BYTES // size)) if on_cpu else microbatch
        if not reproducible:
            piece = max(piece, min(share, (SMALL_BYTES if on_cpu else memory) // size))
        coarse = min(microbatch, coarse_samples)
        if on_cpu:
            coarse = min(coarse, max(COARSE_SAMPLES, PIECE_BYTES // size // 4))
        # Independent of the number of ranks, as the value must be.
        direct = coarse_samples * size < COARSE_BYTES if on_cpu else samples * size <= memory
        if direct and 2 * coarse_samples <= samples:
            coarse_samples = 0
        return cls(piece, coarse, coarse_samples, kept, direct or not on_cpu)


def _gpu_bytes(device: torch.device, comm: Communicator) -> int:
    """Memory of rank 0's GPU."""
    return int(comm.broadcast_object(torch.cuda.get_device_properties(device).total_memory))


@dataclass
class Hessians:
    """The Hessians of parts of the sample."""

    model: nn.Module
    loss_fn: Loss
    sample: HessianSample
    comm: Communicator
    samples: int
    poll: Callable[[], bool] | None
    reproducible: bool
    pieces: Pieces
    made: list[HessianOperator] = field(default_factory=list)

    @property
    def size(self) -> int:
        """P."""
        return sum(p.numel() for p in trainable_parameters(self.model).values())

    @property
    def samples_processed(self) -> int:
        """Samples differentiated so far: once for a gradient, twice for a product."""
        return sum(operator.samples_processed for operator in self.made)

    def of(self, start: int, stop: int, piece: int, keep: bool = True) -> HessianOperator:
        """The Hessian of samples [start, stop), by `piece` at a time."""
        sample = _Part(self.sample, start, stop) if start else self.sample
        return self._operator(sample, stop - start, piece, keep)

    def stratified(self, sample: HessianSample, strata: Sequence[Stratum]) -> HessianOperator:
        """The Hessian of a stratified sample."""
        largest = max(stratum.size for stratum in strata)
        return self._operator(sample, sample.size, min(largest, self.pieces.whole), True, strata)

    def candidates(self, candidates: HessianSample) -> HessianOperator:
        """What a stratified sample is chosen from, of which only losses are wanted."""
        return self._operator(candidates, candidates.size, self.pieces.whole, False)

    def _operator(
        self,
        sample: HessianSample,
        samples: int,
        piece: int,
        keep: bool,
        strata: Sequence[Stratum] = (),
    ) -> HessianOperator:
        operator = HessianOperator(
            self.model, self.loss_fn, sample, self.comm, samples=samples, microbatch=piece,
            poll=self.poll, keep_graphs=max(1, self.pieces.kept // max(piece, 1)) if keep else 0,
            reproducible=self.reproducible, strata=strata,
        )  # fmt: skip
        self.made.append(operator)
        return operator

    def scatter(self, vector: Tensor, start: int, stop: int, groups: int) -> tuple[Scatter, Tensor]:
        """`vᵀ ∇²L_g v` for `groups` parts of the samples, by one product, and the product."""
        operator = self.of(start, stop, max(2, (stop - start) // groups), keep=False)
        values = torch.zeros(len(operator.bounds), dtype=torch.float64)
        vector = vector.to(operator.device, operator.dtype)

        def record(index: int, product: Tensor) -> None:
            values[index] = float(eigen.dots(product.to(vector)[None], vector)[0])

        product = operator.matvec(vector, record)
        weights = torch.tensor(operator.weights, dtype=torch.float64)
        values = self.comm.allreduce_(values)
        # a mean over no targets may be NaN, as may its derivatives
        return Scatter.of_groups(torch.where(weights > 0, values, 0.0), weights), product


@dataclass(frozen=True)
class _Part:
    """Samples [first, stop) of a sample."""

    sample: HessianSample
    first: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.first

    def load(self, start: int, stop: int) -> tuple[Any, Any]:
        return self.sample.load(self.first + start, self.first + stop)


_ACTIVATION_BYTES: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()


def activation_bytes(model: nn.Module, sample: HessianSample, microbatch: int) -> int:
    """Bytes that autograd saves per sample in a forward pass, without the parameters'.

    Measured once for each model, on a microbatch as training has it.
    """
    if model not in _ACTIVATION_BYTES:
        count = max(1, min(microbatch, sample.size))
        leaves = {n: fast.leaf(p, fast.PLAIN) for n, p in trainable_parameters(model).items()}
        fixed = {t.untyped_storage().data_ptr() for t in (*leaves.values(), *model.parameters())}
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.nbytes
            return tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = fast.forward(model, sample.load(0, count)[0], leaves, fast.PLAIN)
        del outputs
        total = sum(size for storage, size in saved.items() if storage not in fixed)
        _ACTIVATION_BYTES[model] = max(1, total // count)
    return _ACTIVATION_BYTES[model]
