"""How the gradients of a step become one sum over all microbatches and ranks.

`OverlappedReduction` is the fast one: Horovod's ring-allreduce of each bucket of gradients starts
as soon as the last local backward pass has completed it, so communication overlaps with the rest of
that pass. `LocalReduction` is that of one rank. `ReproducibleReduction` sums along one fixed tree
(`hpc_absa.summation`), so that any power-of-two number of ranks gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpc_absa import summation
from hpc_absa.comm import Communicator
from hpc_absa.errors import MisuseError
from hpc_absa.training.sums import FLAGS, Flags, StepSums
from hpc_absa.worldsize import share

GRADIENT_CHANGED = (
    "a parameter's .grad was changed during a step, as clipping, zero_grad() or loss.backward() "
    "do: expected step.backward(loss), and other changes between step.reduce() and step.optimize()"
)


class Reduction(Protocol):
    """Sums the gradients of one step; all ranks call all methods, also without a microbatch."""

    def lanes(self, microbatches: range) -> list[range]:
        """This rank's microbatches, in groups that are summed one after the other."""
        ...

    def begin(self) -> None:
        """Start a step without gradients."""
        ...

    def backward(self, *, last: bool) -> AbstractContextManager[None]:
        """Encloses a backward pass; `last` for this rank's last microbatch of the step."""
        ...

    def end_lane(self, sums: StepSums, *, empty: bool) -> None:
        """The microbatches of one lane are done, if it has any; `sums` are theirs."""
        ...

    def finish(self, flags: Flags) -> tuple[StepSums, Flags]:
        """Sum over ranks.

        Every `.grad` then holds the sum over all microbatches; as in PyTorch it is None where no
        backward pass computed one, so that neither momentum nor weight decay applies.

        Args:
            flags: this rank's own.

        Returns:
            The sums of lanes and of flags over all ranks.
        """
        ...

    def sum_lanes(self, lanes: list[Tensor]) -> Tensor:
        """Sum small tensors of equal shape, one for each lane of this rank, over all ranks."""
        ...

    def close(self) -> None:
        """Leave the parameters as they were, without gradients."""
        ...


class _Accumulated:
    """Gradients as PyTorch accumulates them; a change outside of `backward` is refused."""

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._gradients: list[Tensor | None] = []
        self._versions: list[int] = []

    def begin(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        self._gradients = [None] * len(self._parameters)
        self._versions = []

    def backward(self, *, last: bool) -> AbstractContextManager[None]:
        return self

    def __enter__(self) -> None:
        self.require_unchanged()

    def __exit__(self, *error: object) -> None:
        self._gradients.clear()
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is not None and gradient.is_sparse:  # as in the buckets of several ranks
                parameter.grad = gradient = gradient.to_dense()
            self._gradients.append(gradient)
        self._versions = _versions(self._gradients)

    def require_unchanged(self) -> None:
        _require_same(self._parameters, self._gradients)
        if self._versions and self._versions != _versions(self._gradients):
            raise MisuseError(GRADIENT_CHANGED)

    def close(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None


def _require_same(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if parameter.grad is not gradient:
            raise MisuseError(GRADIENT_CHANGED)


def _versions(gradients: Sequence[Tensor | None]) -> list[int]:
    """They increase with every change in place."""
    return [gradient._version for gradient in gradients if gradient is not None]


class LocalReduction(_Accumulated):
    """One rank: nothing to exchange."""

    _sums: StepSums

    def lanes(self, microbatches: range) -> list[range]:
        return [microbatches]

    def end_lane(self, sums: StepSums, *, empty: bool) -> None:
        self._sums = sums

    def finish(self, flags: Flags) -> tuple[StepSums, Flags]:
        self.require_unchanged()
        return self._sums, flags

    def sum_lanes(self, lanes: list[Tensor]) -> Tensor:
        (lane,) = lanes
        return lane


class OverlappedReduction:
    """Horovod's ring-allreduce, overlapped with the backward pass.

    Gradients lie next to each other in buckets, in the order in which the backward pass completes
    them, and a bucket is sent with its last gradient. The last ones are sent after the backward
    pass, on CPUs by MPI itself: an exchange of Horovod's, for which ranks wait some milliseconds,
    has nothing left to overlap with. Horovod's own tensor fusion would join whatever gradients
    happen to be ready (`comm` turns it off): a value's place in such a message decides in which
    order more than two ranks are added, so that the last bits would be random.
    """

    def __init__(self, model: nn.Module, comm: Communicator) -> None:
        self._comm = comm
        self._buckets = _buckets([p for p in model.parameters() if p.requires_grad])
        self._early = _overlapped(self._buckets)
        self._parameters = [p for bucket in self._buckets for p in bucket.parameters]
        self._handles: dict[int, Any] = {}
        self._sums: StepSums
        self._used = [False] * len(self._parameters)
        self._accumulated = list(self._used)
        self._in_step = self._in_backward = False
        self._missing = [0] * len(self._buckets)
        self._repeated = False
        self._observed = False
        self._last = False
        self._versions: list[int] = []
        self._hooks: list[Any] = []
        for index, bucket in enumerate(self._buckets):
            for parameter in bucket.parameters:
                hook = self._hook(index, len(self._hooks))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def lanes(self, microbatches: range) -> list[range]:
        return [share(microbatches, self._comm.rank, self._comm.size)]

    def begin(self) -> None:
        """Zero the gradients in place, so that Horovod always gets the same memory."""
        self._used, self._versions = [False] * len(self._parameters), []
        self._in_step = True
        for index, bucket in enumerate(self._buckets):
            if tuple(g.data_ptr() for g in bucket.gradients) != bucket.addresses:  # see `Bucket`
                self._buckets[index] = bucket = _bucket(list(bucket.parameters))
            bucket.sums.zero_()
            for parameter, gradient in zip(bucket.parameters, bucket.gradients, strict=True):
                parameter.grad = gradient

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """A backward pass within another one, as of reentrant activation checkpointing, can add to
        a gradient more than once. Which addition is the last one is then unknown, so the first
        step observes and sends all buckets in `finish`, and such a model continues to do so.
        """
        self._require_unchanged()
        self._accumulated = [False] * len(self._parameters)
        self._missing = [len(bucket.parameters) for bucket in self._buckets]
        self._last = last and self._observed and not self._repeated
        self._in_backward = True
        try:
            yield
        finally:
            self._last = self._in_backward = False
            self._used = [any(pair) for pair in zip(self._used, self._accumulated, strict=True)]
            self._versions = self._unsent_versions()

    def end_lane(self, sums: StepSums, *, empty: bool) -> None:
        self._sums = sums  # there is one lane

    def finish(self, flags: Flags) -> tuple[StepSums, Flags]:
        self._require_unchanged()
        packed = self._sums.pack()
        used = packed.new_tensor(self._used)
        message = torch.cat([packed, used, flags.pack(packed)])
        for index in range(self._early):
            if index not in self._handles:  # no backward pass completed it
                self._send(index)
        for handle in self._handles.values():
            self._comm.wait(handle)
        self._handles.clear()
        late = [bucket.sums for bucket in self._buckets[self._early :]]
        self._comm.allreduce_list_([*late, message], "last")
        self._observed, self._in_step = True, False
        sums, used, total_flags = message.split([len(packed), len(used), FLAGS])
        _drop_unused(self._parameters, used)
        return StepSums.unpack(sums), Flags.unpack(total_flags)

    def sum_lanes(self, lanes: list[Tensor]) -> Tensor:
        return self._comm.allreduce_(torch.stack(lanes).sum(dim=0))

    def close(self) -> None:
        for handle in self._hooks:
            handle.remove()
        for bucket in self._buckets:
            for parameter in bucket.parameters:
                parameter.grad = None

    def _require_unchanged(self) -> None:
        for bucket in self._buckets:
            _require_same(bucket.parameters, bucket.gradients)
        if self._versions and self._versions != self._unsent_versions():
            raise MisuseError(GRADIENT_CHANGED)

    def _unsent_versions(self) -> list[int]:
        """Horovod may write to the others at any time."""
        unsent = (b.sums for i, b in enumerate(self._buckets) if i not in self._handles)
        return _versions(list(unsent))

    def _hook(self, index: int, place: int) -> Any:
        """Of the parameter at `place` among all, in the bucket `index`."""

        def on_gradient(parameter: Tensor) -> None:
            if not self._in_backward:
                if self._in_step:
                    raise MisuseError(GRADIENT_CHANGED)
                return
            if self._accumulated[place]:
                self._repeated = True
                if index in self._handles:
                    raise RuntimeError(
                        "a backward pass added to a gradient again after it was sent, as in no "
                        "step before; activation checkpointing with use_reentrant=False does not"
                    )
                return
            self._accumulated[place] = True
            self._missing[index] -= 1
            complete = self._last and not self._repeated and not self._missing[index]
            if complete and index < self._early:
                self._send(index)

        return on_gradient

    def _send(self, index: int) -> None:
        sums = self._buckets[index].sums
        self._handles[index] = self._comm.allreduce_async_(sums, f"gradients.{index}")


@dataclass(frozen=True)
class Bucket:
    """Adjacent gradients in one tensor."""

    sums: Tensor
    """Flat."""
    parameters: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    """Views of `sums` with the shapes and memory formats of the parameters."""
    addresses: tuple[int, ...]
    """Of `gradients`: they are no views any more once `model.to` has moved or cast the model."""


BUCKET_BYTES = 1 << 20
"""Bytes of gradients that one message contains at least."""

OVERLAP_BYTES = BUCKET_BYTES // 2
"""Bytes of gradients that the backward pass computes at least while a small message is sent."""

LARGE_BYTES = 4 * BUCKET_BYTES
"""Bytes of a message that takes longer than the wait for Horovod, some milliseconds."""


def _buckets(parameters: list[Tensor]) -> list[Bucket]:
    """Parameters from the last to the first, the order of the backward pass, in buckets."""
    groups: list[list[Tensor]] = []
    for parameter in reversed(parameters):
        last = groups[-1] if groups else []
        filled = sum(p.numel() * p.element_size() for p in last)
        if not last or filled >= BUCKET_BYTES or last[0].dtype != parameter.dtype:
            groups.append([])
        groups[-1].append(parameter)
    return [_bucket(group) for group in groups]


def _overlapped(buckets: list[Bucket]) -> int:
    """How many of them are sent within the backward pass: all before those that are too late."""
    following, early = buckets[-1].sums.nbytes, len(buckets) - 1
    on_cpu = buckets[-1].sums.device.type == "cpu"
    while on_cpu and early and following < OVERLAP_BYTES:
        size = buckets[early - 1].sums.nbytes
        if size >= LARGE_BYTES:
            break
        early, following = early - 1, following + size
    return early


def _bucket(parameters: list[Tensor]) -> Bucket:
    sums = parameters[0].new_zeros(sum(p.numel() for p in parameters))
    pieces = sums.split([p.numel() for p in parameters])
    gradients = tuple(
        # the strides of a dense tensor in the parameter's memory format: additions at full speed
        piece.as_strided(p.size(), torch.empty_like(p, device="meta").stride())
        for piece, p in zip(pieces, parameters, strict=True)
    )
    return Bucket(sums, tuple(parameters), gradients, tuple(g.data_ptr() for g in gradients))


class ReproducibleReduction(_Accumulated):
    """A sum along the tree of `hpc_absa.summation`, once this rank's part of it is complete.

    The number of ranks must satisfy `summation.fits`.
    """

    def __init__(self, model: nn.Module, comm: Communicator) -> None:
        super().__init__(model)
        self._comm = comm
        self._tree = summation.Tree()
        self._sizes = [p.numel() for p in self._parameters]
        self._sums: Tensor

    def lanes(self, microbatches: range) -> list[range]:
        return summation.lanes(microbatches, self._comm.rank, self._comm.size)

    def begin(self) -> None:
        self._tree = summation.Tree()
        super().begin()

    def end_lane(self, sums: StepSums, *, empty: bool) -> None:
        """Add this lane to the tree; an empty lane would add exact zeros and is left out."""
        self.require_unchanged()
        self._sums = sums.pack()
        self._tree.add(None if empty else self._take_gradients(self._sums))

    def finish(self, flags: Flags) -> tuple[StepSums, Flags]:
        total, like = self._tree.total(), self._sums
        sizes = [*self._sizes, len(like), len(self._parameters)]
        if total is None:
            total = like.new_zeros(sum(sizes))
        total = torch.cat([total, flags.pack(like)])
        total = self._comm.allreduce_recursive_doubling_(total)
        *gradients, sums, used, total_flags = total.split([*sizes, FLAGS])
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter).to(parameter.dtype)
        _drop_unused(self._parameters, used)
        return StepSums.unpack(sums), Flags.unpack(total_flags)

    def sum_lanes(self, lanes: list[Tensor]) -> Tensor:
        tree = summation.Tree()
        for lane in lanes:
            tree.add(lane)
        total = tree.total()
        assert total is not None
        return self._comm.allreduce_recursive_doubling_(total)

    def _take_gradients(self, sums: Tensor) -> Tensor:
        """The gradients, `sums`, and which gradients there are, as one flat tensor.

        The gradients are then None.
        """
        parts = [
            sums.new_zeros(p.numel()) if p.grad is None else p.grad.to(sums.dtype).reshape(-1)
            for p in self._parameters
        ]
        used = sums.new_tensor([p.grad is not None for p in self._parameters])
        super().begin()
        return torch.cat([*parts, sums, used])


def _drop_unused(parameters: Sequence[Tensor], used: Tensor) -> None:
    for parameter, number in zip(parameters, used.tolist(), strict=True):
        if not number:
            parameter.grad = None
