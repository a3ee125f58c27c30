"""Who saves: each with the calls that its own documentation gives, and made durable by fsync."""

from __future__ import annotations

import os
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed import checkpoint as dcp

from hpc_absa.checkpoint import CheckpointManager
from hpc_absa.checkpoint.async_checkpointer import AsyncCheckpointer
from hpc_absa.comm import Communicator, SerialCommunicator
from hpc_absa.progress import Position, Progress
from hpc_absa.records import ScheduleState
from hpc_absa.training.state import TrainState


@dataclass(frozen=True)
class State:
    """What is saved: parameters, buffers and momentum."""

    model: nn.Module
    optimizer: torch.optim.SGD

    def tensors(self) -> dict[str, Any]:
        """As PyTorch's users save it."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        momentum = (s["momentum_buffer"] for s in self.optimizer.state.values())
        return sum(t.nbytes for t in [*self.model.state_dict().values(), *momentum])


def train_state(state: State) -> TrainState:
    """As a run has it."""
    progress = Progress(Position(step=1), ScheduleState(32, 0.1))
    return TrainState(state.model, state.optimizer, progress)


class Contender(Protocol):
    """One way to save; `save` returns when training may continue."""

    name: str

    def save(self, state: State, folder: Path) -> None: ...

    def busy(self) -> bool:
        """Whether the files of the last `save` are still being written."""
        ...

    def wait(self) -> None:
        """Return once they are durable."""
        ...


class Blocking:
    """Contenders that are done when `save` returns."""

    def busy(self) -> bool:
        return False

    def wait(self) -> None:
        pass


class Disk(Blocking):
    """The same bytes from memory, nothing checked."""

    name = "write, fsync"

    def save(self, state: State, folder: Path) -> None:
        momentum = [s["momentum_buffer"] for s in state.optimizer.state.values()]
        with (folder / "bytes").open("wb") as file:
            for tensor in [*state.model.state_dict().values(), *momentum]:
                file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())


class HpcAbsa:
    """A snapshot, then in the background: write, fsync, digest, comparison, rename."""

    name = "hpc_absa"

    def __init__(self, comm: Communicator | None = None) -> None:
        # One checkpointer throughout, as in a run, so that snapshots reuse their memory.
        self._manager = CheckpointManager(Path(), 2)
        self._checkpointer = AsyncCheckpointer(
            self._manager,
            comm or SerialCommunicator(),
            background=True,
            shard_bytes=64 << 20,
            on_error="stop",
            warn=print,
        )
        self._saved = threading.Event()

    def save(self, state: State, folder: Path) -> None:
        self._manager.folder = folder
        self._saved.clear()
        attributes = {"world_size": 1, "global_batch": 32, "samples": 0}
        saved = train_state(state)
        scalars = saved.scalars(0, "sha256:0", "", **attributes)
        path = folder / "step-0000000001-phase-001.h5"
        self._checkpointer.save(path, scalars, saved.tensors(), lambda _: self._saved.set())

    def busy(self) -> bool:
        _, failed = self._checkpointer.flags()
        return not self._saved.is_set() and not failed

    def wait(self) -> None:
        self._checkpointer.settle()


class TorchSave(Blocking):
    """`torch.save`, and fsync of file and folder."""

    name = "torch.save + fsync"

    def save(self, state: State, folder: Path) -> None:
        with (folder / "state.pt.tmp").open("wb") as file:
            torch.save(state.tensors(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / "state.pt.tmp", folder / "state.pt")
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


class Dcp(Blocking):
    """`torch.distributed.checkpoint.save`, which syncs its files by default."""

    name = "torch.distributed.checkpoint"

    def save(self, state: State, folder: Path) -> None:
        writer = dcp.FileSystemWriter(folder, sync_files=True)
        dcp.save(state.tensors(), storage_writer=writer, no_dist=True)


class DcpAsync:
    """`torch.distributed.checkpoint.async_save`: staged in memory, written by a thread."""

    name = "torch.distributed.checkpoint, async"

    def __init__(self) -> None:
        self._future: Future[Any] = Future()

    def save(self, state: State, folder: Path) -> None:
        writer = dcp.FileSystemWriter(folder, sync_files=True)
        future = dcp.async_save(state.tensors(), storage_writer=writer, no_dist=True)
        assert isinstance(future, Future)
        self._future = future

    def busy(self) -> bool:
        return not self._future.done()

    def wait(self) -> None:
        self._future.result()


CONTENDERS = (HpcAbsa, TorchSave, Dcp, DcpAsync)
