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

from hpc_absa.checkpoint import Store
from hpc_absa.comm import SerialCommunicator
from hpc_absa.progress import Position
from hpc_absa.records import ScheduleState
from hpc_absa.training.saving import Saver
from hpc_absa.training.state import Live, Progress, described, scalars, tensors


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


class Contender(Protocol):
    """One way to save; `save` returns when the training may go on."""

    name: str

    def save(self, state: State, folder: Path) -> None: ...

    def busy(self) -> bool:
        """Whether the files of the last `save` are still being written."""
        ...

    def wait(self) -> None:
        """Return once they are durable."""
        ...

    def close(self) -> None: ...


class Blocking:
    """Contenders that are done when `save` returns."""

    def busy(self) -> bool:
        return False

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


class Disk(Blocking):
    """The same bytes from memory, nothing checked."""

    name = "disk (write, fsync)"

    def save(self, state: State, folder: Path) -> None:
        momentum = [s["momentum_buffer"] for s in state.optimizer.state.values()]
        with (folder / "bytes").open("wb") as file:
            for tensor in [*state.model.state_dict().values(), *momentum]:
                file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())


class Ours:
    """A snapshot, then a background thread: digest, write, fsync, comparison, rename."""

    name = "hpc_absa"

    def __init__(self) -> None:
        self._saver: Saver | None = None

    def save(self, state: State, folder: Path) -> None:
        if self._saver is None:
            self._store = Store(folder, 2)
            self._saver = Saver(
                self._store,
                SerialCommunicator(),
                background=True,
                shard_bytes=1 << 62,
                on_error="stop",
                warn=print,
            )
        # One saver throughout, as in a run, whose snapshots share their memory.
        self._store.folder = folder
        content = scalars(Progress(Position(), ScheduleState(32, 0.1)), 0, "sha256:0", "")
        content = described(content, world_size=1, global_batch=32, samples=0)
        live = Live(state.model, state.optimizer, None)
        path = folder / "step-0000000001-phase-001.h5"
        self._saver.save(path, content, tensors(live), lambda _: None)

    def busy(self) -> bool:
        return any(thread.name == "checkpoint" for thread in threading.enumerate())

    def wait(self) -> None:
        assert self._saver is not None
        self._saver.settle()

    def close(self) -> None:
        pass


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
        found = dcp.async_save(state.tensors(), storage_writer=writer, no_dist=True)
        assert isinstance(found, Future)
        self._future = found

    def busy(self) -> bool:
        return not self._future.done()

    def wait(self) -> None:
        self._future.result()

    def close(self) -> None:
        pass


CONTENDERS = (Ours, TorchSave, Dcp, DcpAsync)
