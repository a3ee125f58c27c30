"""How a step's gradients become one sum over all microbatches and ranks.

`Overlapped` is the fast one: Horovod's ring-allreduce of each gradient starts as soon as the last
local backward pass has finished it, so that communication hides behind the rest of that pass.
`Reproducible` is the exact one: the sum is taken along one fixed tree (`hpc_absa.summation`),
whatever the number of ranks, so that any power-of-two world comes to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hpc_absa import summation
from hpc_absa.comm import Communicator
from hpc_absa.worldsize import share

FLAGS = 4
"""The last values of what travels beside the gradients: they belong to a rank, not to a lane."""


class Reduction(Protocol):
    """Adds up the gradients of one step; every rank calls every method, also with no microbatch."""

    def lanes(self, microbatches: range) -> list[range]:
        """This rank's microbatches, in the groups that are summed one after the other."""
        ...

    def begin(self) -> None:
        """Start a step with all gradients zero."""
        ...

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Wrap the backward pass of a microbatch; `last` is this rank's last of the step."""
        ...

    def end_lane(self, extra: Tensor) -> None:
        """A group of `lanes` is complete; `extra` is its flat sum of everything but gradients."""
        ...

    def finish(self, extra: Tensor) -> Tensor:
        """Gradients hold the sum over all ranks on return; returns the sum of the extras."""
        ...


class Overlapped:
    """Horovod's ring-allreduce, overlapped with the backward pass.

    Gradients lie side by side in buckets, in the order in which the backward pass finishes them,
    and a bucket sets off with its last one. Horovod itself would join whatever gradients happen to
    be ready (which `comm` turns off): where a value lies in such a message decides the order in
    which more than two ranks' values are added, so that its last bits would be chance.
    """

    def __init__(self, model: nn.Module, comm: Communicator) -> None:
        """Takes over the gradients of every parameter that requires one."""
        self._comm = comm
        self._buckets = _buckets([p for p in model.parameters() if p.requires_grad])
        self._handles: dict[int, Any] = {}
        self._waiting: list[int] = []
        self._last = False
        if comm.size > 1:
            for index, bucket in enumerate(self._buckets):
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(self._hook(index))

    def lanes(self, microbatches: range) -> list[range]:
        """One group: this rank's share."""
        return [share(microbatches, self._comm.rank, self._comm.size)]

    def begin(self) -> None:
        """Zero the gradients in place, so that their memory stays where Horovod knows it."""
        for bucket in self._buckets:
            bucket.sums.zero_()
            for parameter, gradient in zip(bucket.parameters, bucket.gradients, strict=True):
                parameter.grad = gradient
        self._waiting = [len(bucket.parameters) for bucket in self._buckets]

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """During the last pass, each finished bucket sets off on its way."""
        self._last = last
        try:
            yield
        finally:
            self._last = False

    def end_lane(self, extra: Tensor) -> None:
        """Nothing to do: there is one group."""

    def finish(self, extra: Tensor) -> Tensor:
        """Send what no backward pass filled (unused parameter, no microbatch); wait for all."""
        extra_handle = self._comm.allreduce_async_(extra, "extra")
        for index in range(len(self._buckets)):
            if index not in self._handles:
                self._send(index)
        for handle in self._handles.values():
            self._comm.wait(handle)
        self._handles.clear()
        self._comm.wait(extra_handle)
        return extra

    def _hook(self, index: int) -> Any:
        def on_gradient(parameter: Tensor) -> None:
            if self._last:
                self._waiting[index] -= 1
                if not self._waiting[index]:
                    self._send(index)

        return on_gradient

    def _send(self, index: int) -> None:
        sums = self._buckets[index].sums
        self._handles[index] = self._comm.allreduce_async_(sums, f"gradients.{index}")


@dataclass(frozen=True)
class Bucket:
    """Neighbouring gradients in one piece of memory."""

    sums: Tensor
    """Flat."""
    parameters: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    """Views of `sums`, laid out as their parameters."""


BUCKET = 1 << 20
"""Bytes of gradients that are worth a message of their own."""


def _buckets(parameters: list[Tensor]) -> list[Bucket]:
    """Parameters from the last to the first, as the backward pass comes to them, in buckets."""
    groups: list[list[Tensor]] = []
    for parameter in reversed(parameters):
        last = groups[-1] if groups else []
        filled = sum(p.numel() * p.element_size() for p in last)
        if not last or filled >= BUCKET or last[0].dtype != parameter.dtype:
            groups.append([])
        groups[-1].append(parameter)
    return [_bucket(group) for group in groups]


def _bucket(parameters: list[Tensor]) -> Bucket:
    sums = parameters[0].new_zeros(sum(p.numel() for p in parameters))
    pieces = sums.split([p.numel() for p in parameters])
    gradients = (
        # strides of a dense tensor laid out as the parameter, so that addition runs at full speed
        piece.as_strided(p.size(), torch.empty_like(p, device="meta").stride())
        for piece, p in zip(pieces, parameters, strict=True)
    )
    return Bucket(sums, tuple(parameters), tuple(gradients))


class Reproducible:
    """Along the tree of `hpc_absa.summation`, once this rank's part of it is complete."""

    def __init__(self, model: nn.Module, comm: Communicator) -> None:
        """`comm.size` must fit the tree."""
        self._comm = comm
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._tree = summation.Tree()

    def lanes(self, microbatches: range) -> list[range]:
        """This rank's lanes of the fixed tree; empty ones keep the tree's shape."""
        return summation.lanes(microbatches, self._comm.rank, self._comm.size)

    def begin(self) -> None:
        """Forget the step before."""
        self._tree = summation.Tree()
        for parameter in self._parameters:
            parameter.grad = None

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """Nothing travels before the local tree is complete."""
        yield

    def end_lane(self, extra: Tensor) -> None:
        """Carry this lane's sum into the tree; an empty lane would add exact zeros."""
        present = any(parameter.grad is not None for parameter in self._parameters)
        self._tree.add(self._take(extra) if present else None)

    def finish(self, extra: Tensor) -> Tensor:
        """Add up across ranks and hand the sum back to the gradients."""
        total = self._tree.total()
        if total is None:
            total = torch.zeros(self._length() + extra.numel(), device=extra.device)
        total[-FLAGS:] = extra[-FLAGS:]
        self._comm.allreduce_recursive_doubling_(total)
        start = 0
        for parameter in self._parameters:
            stop = start + parameter.numel()
            parameter.grad = total[start:stop].view_as(parameter).to(parameter.dtype)
            start = stop
        return total[start:]

    def _length(self) -> int:
        return sum(parameter.numel() for parameter in self._parameters)

    def _take(self, extra: Tensor) -> Tensor:
        """The gradients and `extra` as one flat tensor; the gradients start anew."""
        parts = [
            torch.zeros(p.numel(), device=extra.device)
            if p.grad is None
            else p.grad.float().reshape(-1)
            for p in self._parameters
        ]
        for parameter in self._parameters:
            parameter.grad = None
        return torch.cat([*parts, extra])
