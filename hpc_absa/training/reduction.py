"""How a step's gradients become one sum over all microbatches and ranks.

`Overlapped` is the fast one: Horovod's ring-allreduce of each gradient starts as soon as the last
local backward pass has finished it, so that communication hides behind the rest of that pass.
`Reproducible` is the exact one: the sum is taken along one fixed tree (`hpc_absa.summation`),
whatever the number of ranks, so that any power-of-two world comes to the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    """Horovod's ring-allreduce, overlapped with the backward pass."""

    def __init__(self, model: nn.Module, comm: Communicator) -> None:
        """Hooks every parameter that requires a gradient."""
        self._comm = comm
        self._parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self._handles: dict[str, Any] = {}
        self._last = False
        if comm.size > 1:
            for name, parameter in self._parameters:
                parameter.register_post_accumulate_grad_hook(self._hook(name))

    def lanes(self, microbatches: range) -> list[range]:
        """One group: this rank's share."""
        return [share(microbatches, self._comm.rank, self._comm.size)]

    def begin(self) -> None:
        """Zero the gradients in place, so that their memory stays where Horovod knows it."""
        for _, parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        torch._foreach_zero_([p.grad for _, p in self._parameters if p.grad is not None])

    @contextmanager
    def backward(self, *, last: bool) -> Iterator[None]:
        """During the last pass, each finished gradient sets off on its way."""
        self._last = last
        try:
            yield
        finally:
            self._last = False

    def end_lane(self, extra: Tensor) -> None:
        """Nothing to do: there is one group."""

    def finish(self, extra: Tensor) -> Tensor:
        """Send what no backward pass reached (unused parameter, no microbatch); wait for all."""
        extra_handle = self._comm.sum_async_(extra, "extra")
        for name, parameter in self._parameters:
            if name not in self._handles:
                self._send(name, parameter)
        for handle in self._handles.values():
            self._comm.wait(handle)
        self._handles.clear()
        self._comm.wait(extra_handle)
        return extra

    def _hook(self, name: str) -> Any:
        def on_gradient(parameter: Tensor) -> None:
            if self._last:
                self._send(name, parameter)

        return on_gradient

    def _send(self, name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None, "begin() gives every parameter a gradient"
        self._handles[name] = self._comm.sum_async_(parameter.grad, f"gradient.{name}")


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
        self._comm.sum_in_pairs_(total)
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
