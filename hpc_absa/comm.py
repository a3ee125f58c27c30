"""The one place that imports Horovod and mpi4py; a serial communicator is a first-class one.

Gradients travel through Horovod, which overlaps them with the backward pass.
Everything that must be complete before the next line of code (Hessian-vector products, decisions,
states) travels through MPI itself, on a duplicate of the communicator Horovod was initialised with,
or through Horovod where it runs without MPI (`horovodrun --gloo`).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

from hpc_absa.allocation import WORLD_SIZE_VARIABLES
from hpc_absa.errors import CollectiveError, ExitStatus, HpcAbsaError, UsageError

T = TypeVar("T")

SETTINGS = {
    # Messages of chance content would be summed in chance order: see `training.reduction`.
    "HOROVOD_FUSION_THRESHOLD": "0",
    # Horovod's thread asks the other ranks for news a thousand times a second, and Open MPI waits
    # for each answer at full speed: unless it yields it takes a third of a core from the training.
    "OMPI_MCA_mpi_yield_when_idle": "1",
}
"""Environment of a rank, unless the user has set it otherwise. Two ranks of one core each, ResNet-8
on CIFAR-10, global batch 256: 496 samples/s without yielding, 810 with it (two cores of an AMD
EPYC, nothing else running)."""

POLL = 5e-5
"""Seconds between looks at a sum that is under way: some 1 % of a small model's step."""


class Communicator(Protocol):
    """What training, curvature and checkpoints need from a world of ranks.

    Every method but `abort` is a collective: all ranks call it, in the same order.
    """

    rank: int
    size: int
    local_rank: int
    """Rank among those on the same host."""
    local_size: int
    backend: str
    """For people: `serial`, `Horovod over MPI`, `Horovod over Gloo`."""

    def allreduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor` (contiguous, any device) by its sum over ranks; returns it."""
        ...

    def allreduce_recursive_doubling_(self, tensor: torch.Tensor) -> torch.Tensor:
        """As `allreduce_`, along a fixed binary tree over ranks; needs 2^n ranks."""
        ...

    def allreduce_async_(self, tensor: torch.Tensor, name: str) -> Any:
        """Start `allreduce_` in the background; `name` pairs up the ranks' calls, in any order."""
        ...

    def wait(self, handle: Any) -> None:
        """Return once the sum behind `handle` has arrived in its tensor."""
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

    def exchange_heartbeats(self) -> bool:
        """Send a heartbeat to the next rank; whether one arrived from the previous rank.

        Not a collective; called from one thread of its own. Always True without MPI.
        """
        ...

    def abort(self, status: int) -> None:
        """End the whole world now, from one rank, with this exit status."""
        ...

    def close(self) -> None:
        """Leave the world in order."""
        ...


class SerialCommunicator:
    """A world of one: nothing to exchange."""

    rank = local_rank = 0
    size = local_size = 1
    backend = "serial"

    def allreduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over one rank is the tensor itself."""
        return tensor

    def allreduce_recursive_doubling_(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over one rank is the tensor itself."""
        return tensor

    def allreduce_async_(self, tensor: torch.Tensor, name: str) -> None:
        """Nothing to start."""

    def wait(self, handle: Any) -> None:
        """Nothing to wait for."""

    def broadcast_(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """The root's tensor is this one."""
        return tensor

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """The root's object is this one."""
        return value

    def allgather_object(self, value: Any) -> list[Any]:
        """One rank, one object."""
        return [value]

    def exchange_heartbeats(self) -> bool:
        """No other rank."""
        return True

    def abort(self, status: int) -> None:
        """End this process without clean-up, as a world's abort does."""
        os._exit(status)

    def close(self) -> None:
        """Nothing to leave."""


class HorovodCommunicator:
    """Ranks started by mpirun, horovodrun or srun."""

    def __init__(self) -> None:
        try:
            import horovod.torch as hvd
        except ImportError as error:
            raise UsageError(
                f"Horovod does not import in {sys.executable} ({error}); launch/bootstrap.sh "
                "builds an environment that has it"
            ) from None
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        self._hvd = hvd
        self._mpi = self._mpi_world()
        self._beats = self._mpi.Dup() if self._mpi else None
        self._beat_sent: Any = None
        hvd.init()
        self.rank, self.size = hvd.rank(), hvd.size()
        self.local_rank, self.local_size = hvd.local_rank(), hvd.local_size()
        self.backend = "Horovod over MPI" if self._mpi else "Horovod over Gloo"

    def _mpi_world(self) -> Any:
        """A communicator of our own, None where Horovod does not run over MPI.

        MPI is initialised here, with `MPI_THREAD_MULTIPLE`, because Horovod's background thread and
        our calls use it at the same time; Horovod finds it initialised and joins in.
        """
        hvd = self._hvd
        if not hvd.mpi_built() or os.environ.get("HOROVOD_CONTROLLER", "mpi").lower() == "gloo":
            return None
        from mpi4py import MPI

        if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
            return None
        return MPI.COMM_WORLD.Dup()

    def allreduce_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Blocking sum, through MPI for tensors in host memory."""
        if self._mpi and tensor.device.type == "cpu":
            from mpi4py import MPI

            self._mpi.Allreduce(MPI.IN_PLACE, tensor.detach().numpy())
            return tensor
        return self._hvd.allreduce_(tensor, op=self._hvd.Sum, name=f"sum.{tuple(tensor.shape)}")

    def allreduce_recursive_doubling_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Exchange with the partner at distance 1, 2, 4, ...: addition of two numbers commutes."""
        assert self.size & (self.size - 1) == 0, "the tree wants a power of two"
        if not (self._mpi and tensor.device.type == "cpu"):
            rows = self._hvd.allgather(tensor[None], name=f"pairs.{tuple(tensor.shape)}")
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
        """Horovod's fused ring-allreduce, in the background."""
        return self._hvd.allreduce_async_(tensor, op=self._hvd.Sum, name=name)

    def wait(self, handle: Any) -> None:
        """Block until the tensor behind `handle` holds the sum.

        Horovod's own wait spins on the interpreter's lock, which starves signal handlers, the other
        threads, and ranks that share the core; looking every `POLL` seconds does not.
        """
        while not self._hvd.poll(handle):
            time.sleep(POLL)
        self._hvd.synchronize(handle)

    def broadcast_(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """Blocking broadcast, through MPI for tensors in host memory."""
        if self._mpi and tensor.device.type == "cpu":
            self._mpi.Bcast(tensor.detach().numpy(), root=root)
            return tensor
        return self._hvd.broadcast_(tensor, root_rank=root, name=f"broadcast.{tuple(tensor.shape)}")

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Small objects only: they are serialised."""
        if self._mpi:
            return self._mpi.bcast(value, root=root)
        return self._hvd.broadcast_object(value, root_rank=root)

    def allgather_object(self, value: Any) -> list[Any]:
        """Small objects only: they are serialised."""
        if self._mpi:
            return list(self._mpi.allgather(value))
        return list(self._hvd.allgather_object(value))

    def exchange_heartbeats(self) -> bool:
        """An empty message around the ring of ranks."""
        if self._beats is None or self.size == 1:
            return True
        from mpi4py import MPI

        if self._beat_sent is None or self._beat_sent.Test():
            self._beat_sent = self._beats.Isend([None, 0, MPI.BYTE], (self.rank + 1) % self.size)
        heard, before = False, (self.rank - 1) % self.size
        while self._beats.Iprobe(before):
            self._beats.Recv([None, 0, MPI.BYTE], before)
            heard = True
        return heard

    def abort(self, status: int) -> None:
        """MPI ends every rank; without MPI, horovodrun ends the others when this process dies."""
        if self._mpi:
            self._mpi.Abort(status)
        os._exit(status)

    def close(self) -> None:
        """Shut Horovod and MPI down."""
        self._hvd.shutdown()
        if self._mpi:
            from mpi4py import MPI

            MPI.Finalize()


def connect() -> Communicator:
    """The world this process was started in: Horovod's under a launcher, else a serial one."""
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
