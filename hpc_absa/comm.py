"""The one place that imports Horovod and mpi4py; the serial communicator is a real one.

Gradients go through Horovod, which overlaps them with the backward pass. Everything that must be
complete before the next line of code (Hessian-vector products, decisions, states) goes through MPI
itself, on a duplicate of the communicator that Horovod was initialized with, or through Horovod
where it runs without MPI (`horovodrun --gloo`).
"""

from __future__ import annotations

import os
import sys
import time
from array import array
from collections.abc import Callable, Generator, Sequence
from typing import Any, Protocol, TypeVar

import torch

from hpc_absa.allocation import WORLD_SIZE_VARIABLES
from hpc_absa.errors import CollectiveError, ExitStatus, HpcAbsaError, UsageError

T = TypeVar("T")

SETTINGS = {
    # Tensor fusion would add up messages in an order that timing decides: `training.reduction`.
    "HOROVOD_FUSION_THRESHOLD": "0",
    # Horovod's thread polls the other ranks a thousand times a second, and Open MPI waits for each
    # answer in a busy loop: without yielding it takes a third of a core from training.
    "OMPI_MCA_mpi_yield_when_idle": "1",
}
"""Environment of a rank, unless the user has set it. With two ranks of one core each, ResNet-8 on
CIFAR-10, global batch 256: 496 samples/s without yielding, 810 with it (AMD EPYC, two cores)."""

CYCLE = "HOROVOD_CYCLE_TIME"
CYCLE_MILLISECONDS = "5"
"""Between Horovod's exchanges over MPI, where its default is 1: each takes time from training, also
without a message, and it adds up only what is ready early in a backward pass."""

POLL_SECONDS = (5e-5, 1e-3)
"""Shortest and longest time between checks of an allreduce in progress."""
POLL_SHARE = 1 / 16
"""Between these limits, the part of the time waited so far."""


class Communicator(Protocol):
    """What training, curvature and checkpoints need from a group of ranks.

    All methods but `exchange_heartbeats` and `abort` are collectives: all ranks call them, in the
    same order.
    """

    rank: int
    size: int
    local_rank: int
    """Rank among those on the same host."""
    local_size: int
    backend: str
    """`serial`, `Horovod over MPI` or `Horovod over Gloo`."""

    def allreduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` (contiguous, any device) by its sum over ranks; returns it."""
        ...

    def allreduce_recursive_doubling_(self, tensor: torch.Tensor) -> torch.Tensor:
        """As `allreduce_`, in a fixed order of summation; needs a power of two of ranks."""
        ...

    def allreduce_async_(self, tensor: torch.Tensor, name: str) -> Any:
        """Start `allreduce_` in the background; calls with equal `name` belong together."""
        ...

    def wait(self, handle: Any) -> None:
        """Return once the allreduce behind `handle` is complete."""
        ...

    def allreduce_list_(self, tensors: Sequence[torch.Tensor], name: str) -> None:
        """`allreduce_` of each, at once; calls with equal `name` belong together."""
        ...

    def broadcast_(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Replace `tensor` by the root's; returns it."""
        ...

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """The root's small Python object, on every rank."""
        ...

    def allgather_object(self, value: Any) -> list[Any]:
        """Every rank's small Python object, by rank, on every rank."""
        ...

    def gather_object(self, value: Any) -> Generator[Any]:
        """Every rank's Python object, by rank, on rank 0 alone, which has one of them at a time.

        All ranks iterate over it to its end; rank 0 may close it after the first.
        """
        ...

    def exchange_calls(self, value: Any) -> list[Any]:
        """As `allgather_object`; never mixed up with another collective that other ranks are in."""
        ...

    def exchange_heartbeats(self, mark: int) -> int | None:
        """Send a heartbeat with `mark` to the next rank.

        Not a collective; called from one thread of its own.

        Returns:
            The newest mark from the previous rank, None if no heartbeat has arrived since the last
            call; `mark` itself without MPI.
        """
        ...

    def abort(self, status: int) -> None:
        """End all ranks now, from one of them, with this exit status."""
        ...

    def close(self) -> None:
        """Shut down in order."""
        ...


class SerialCommunicator:
    """One rank."""

    rank = local_rank = 0
    size = local_size = 1
    backend = "serial"

    def allreduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def allreduce_recursive_doubling_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def allreduce_async_(self, tensor: torch.Tensor, name: str) -> None:
        pass

    def wait(self, handle: Any) -> None:
        pass

    def allreduce_list_(self, tensors: Sequence[torch.Tensor], name: str) -> None:
        pass

    def broadcast_(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        return tensor

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        return value

    def allgather_object(self, value: Any) -> list[Any]:
        return [value]

    def gather_object(self, value: Any) -> Generator[Any]:
        yield value

    exchange_calls = allgather_object

    def exchange_heartbeats(self, mark: int) -> int | None:
        return mark

    def abort(self, status: int) -> None:
        os._exit(status)

    def close(self) -> None:
        pass


class HorovodCommunicator:
    """Ranks started by mpirun, horovodrun or srun."""

    def __init__(self) -> None:
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise UsageError(
                f"Horovod cannot be imported in {sys.executable} ({error}); launch/bootstrap.sh "
                "builds an environment with it"
            ) from None
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        self._hvd = hvd
        self._mpi = self._duplicate_world()
        if self._mpi and not torch.cuda.is_available():
            os.environ.setdefault(CYCLE, CYCLE_MILLISECONDS)
        self._calls, self._heartbeats = (self._mpi.Dup() if self._mpi else None for _ in range(2))
        self._heartbeat: tuple[Any, Any] | None = None
        hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self.backend = "Horovod over MPI" if self._mpi else "Horovod over Gloo"

    def _duplicate_world(self) -> Any:
        """A duplicate of MPI_COMM_WORLD; None where Horovod does not run over MPI.

        MPI is initialized here, with `MPI_THREAD_MULTIPLE`, because Horovod's background thread and
        our calls use it at the same time; Horovod uses an MPI that is initialized already.
        """
        hvd = self._hvd
        if not hvd.mpi_built() or os.environ.get("HOROVOD_CONTROLLER", "mpi").lower() == "gloo":
            return None
        from mpi4py import MPI

        if MPI.Is_finalized():
            raise UsageError(
                "MPI is finalized: expected one hpc_absa.Run in a process of several ranks, and "
                "nothing over MPI after it"
            )
        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            return None
        return MPI.COMM_WORLD.Dup()

    def allreduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._mpi and tensor.device.type == "cpu":
            from mpi4py import MPI

            self._mpi.Allreduce(MPI.IN_PLACE, tensor.detach().numpy())
            return tensor
        return self._hvd.allreduce_(tensor, op=self._hvd.Sum, name=f"sum.{tuple(tensor.shape)}")

    def allreduce_recursive_doubling_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Exchange with the partner at distance 1, 2, 4, ...: a sum of two numbers commutes."""
        assert self.size & (self.size - 1) == 0, "recursive doubling needs a power of two of ranks"
        if not (self._mpi and tensor.device.type == "cpu"):
            rows = self._hvd.allgather(tensor[None], name=f"doubling.{tuple(tensor.shape)}")
            while len(rows) > 1:
                rows = rows[0::2] + rows[1::2]
            return tensor.copy_(rows[0])
        received, distance = torch.empty_like(tensor), 1
        while distance < self.size:
            partner = self.rank ^ distance
            self._mpi.Sendrecv(tensor.numpy(), partner, recvbuf=received.numpy(), source=partner)
            tensor += received
            distance *= 2
        return tensor

    def allreduce_async_(self, tensor: torch.Tensor, name: str) -> Any:
        return self._hvd.allreduce_async_(tensor, op=self._hvd.Sum, name=name)

    def wait(self, handle: Any) -> None:
        """Poll: Horovod's own wait is a busy loop that holds the interpreter's lock.

        That would block signal handlers, the other threads, and ranks on the same core.
        """
        _poll(lambda: self._hvd.poll(handle))
        self._hvd.synchronize(handle)

    def allreduce_list_(self, tensors: Sequence[torch.Tensor], name: str) -> None:
        """By MPI itself, without Horovod's negotiation, which takes a cycle or two."""
        if not (self._mpi and all(map(_is_mpi_number, tensors))):
            handles = [
                self.allreduce_async_(tensor, f"{name}.{index}")
                for index, tensor in enumerate(tensors)
            ]
            for handle in handles:
                self.wait(handle)
            return
        _poll(self._mpi.Ibarrier().Test)  # Allreduce itself would wait in a busy loop
        for tensor in tensors:
            self.allreduce_(tensor)

    def broadcast_(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        if self._mpi and tensor.device.type == "cpu":
            self._mpi.Bcast(tensor.detach().numpy(), root=root)
            return tensor
        return self._hvd.broadcast_(tensor, root_rank=root, name=f"broadcast.{tuple(tensor.shape)}")

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        if self._mpi:
            return self._mpi.bcast(value, root=root)
        # Horovod's default is the type's name, which may differ between ranks
        return self._hvd.broadcast_object(value, root_rank=root, name="object")

    def allgather_object(self, value: Any) -> list[Any]:
        if self._mpi:
            return list(self._mpi.allgather(value))
        return list(self._hvd.allgather_object(value, name="objects"))

    def gather_object(self, value: Any) -> Generator[Any]:
        if not self._mpi:
            objects = self.allgather_object(value)
            yield from objects if self.rank == 0 else ()
        elif self.rank:
            self._mpi.send(value, 0)
        else:
            others = iter(range(1, self.size))
            try:
                yield value
                for rank in others:
                    yield self._mpi.recv(source=rank)
            finally:  # where the caller had an error, the others must not wait
                for rank in others:
                    self._mpi.recv(source=rank)

    def exchange_calls(self, value: Any) -> list[Any]:
        if self._calls:
            return list(self._calls.allgather(value))
        return list(self._hvd.allgather_object(value, name="calls"))

    def exchange_heartbeats(self, mark: int) -> int | None:
        """A number around the ring of ranks."""
        if self._heartbeats is None or self.size == 1:
            return mark
        if self._heartbeat is None or self._heartbeat[0].Test():
            sent = array("q", [mark])  # MPI reads it later
            self._heartbeat = self._heartbeats.Isend(sent, (self.rank + 1) % self.size), sent
        received, previous = None, (self.rank - 1) % self.size
        while self._heartbeats.Iprobe(previous):
            self._heartbeats.Recv(arrived := array("q", [0]), previous)
            received = arrived[0]
        return received

    def abort(self, status: int) -> None:
        """MPI ends every rank; without MPI, horovodrun ends the others when this process exits."""
        if self._mpi:
            self._mpi.Abort(status)
        os._exit(status)

    def close(self) -> None:
        self._hvd.shutdown()
        if self._mpi:
            from mpi4py import MPI

            if not MPI.Is_finalized():  # by Horovod, where the script has called hvd.init()
                MPI.Finalize()


def _poll(complete: Callable[[], bool]) -> None:
    begin, (shortest, longest) = time.monotonic(), POLL_SECONDS
    while not complete():
        share = POLL_SHARE * (time.monotonic() - begin)
        time.sleep(min(max(shortest, share), longest))


def _is_mpi_number(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype in (torch.float32, torch.float64)


def connect() -> Communicator:
    """The communicator of this process: Horovod's if a launcher started it, else a serial one."""
    if any(variable in os.environ for variable in WORLD_SIZE_VARIABLES):
        return HorovodCommunicator()
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        return HorovodCommunicator()
    return SerialCommunicator()


def raise_on_all_ranks(comm: Communicator, action: Callable[[], T]) -> T:
    """The value of `action()` on this rank, unless it fails on any rank (a collective).

    All ranks learn of an error before any of them leaves, so that none waits for one that left.
    `action` itself must not enter a collective.

    Raises:
        CollectiveError: on all ranks, with the message of the first rank on which `action` raised
            an `HpcAbsaError`.
    """
    error: tuple[str, ExitStatus] | None = None
    try:
        value = action()
    except HpcAbsaError as raised:
        error = (str(raised), raised.status)
    first = next((e for e in comm.allgather_object(error) if e), None)
    if first:
        raise CollectiveError(*first)
    return value
