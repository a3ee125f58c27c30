"""One rank of `mpirun -np N python -m benchmarks.checkpoint.ranks MODEL FOLDER KIND`.

Saves the state with all ranks, drops the files from the page cache, and restores it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed import checkpoint as dcp

from benchmarks.checkpoint.contenders import HpcAbsa, State, TorchSave, train_state
from benchmarks.checkpoint.training import Training
from hpc_absa.checkpoint import Key, restore
from hpc_absa.comm import Communicator, connect
from hpc_absa.rundir.paths import checkpoint_files


class Ours:
    def __init__(self, comm: Communicator) -> None:
        self._comm, self._saving = comm, HpcAbsa(comm)

    def save(self, state: State, folder: Path) -> None:
        self._saving.save(state, folder)
        self._saving.wait()

    def restore(self, state: State, folder: Path) -> None:
        (path,) = checkpoint_files(folder)
        restored, memory = train_state(state), dict[Key, Tensor]()

        def accept(header: restore.Header) -> dict[Key, Tensor]:
            memory.update(restored.memory(header.places))
            return memory

        content = restore.load(path, self._comm, accept)
        restored.restore(content, str(path), memory)


class Torch:
    """Rank 0 saves and loads; the others receive every tensor."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm

    def save(self, state: State, folder: Path) -> None:
        if self._comm.rank == 0:
            TorchSave().save(state, folder)

    def restore(self, state: State, folder: Path) -> None:
        tensors = state.tensors()
        if self._comm.rank == 0:
            saved = torch.load(folder / "state.pt")
            state.model.load_state_dict(saved["model"])
            state.optimizer.load_state_dict(saved["optimizer"])
            tensors = state.tensors()
        momentum = [each["momentum_buffer"] for each in tensors["optimizer"]["state"].values()]
        for tensor in [*tensors["model"].values(), *momentum]:
            self._comm.broadcast_(tensor)


class Dcp:
    """Ranks write and read parts, as its documentation recommends."""

    def __init__(self, comm: Communicator) -> None:
        # A store of its own: the launcher is the same for all.
        store = distributed.FileStore(str(Path(sys.argv[2]) / f"store-{os.getppid()}"), comm.size)
        distributed.init_process_group("gloo", store=store, rank=comm.rank, world_size=comm.size)

    def save(self, state: State, folder: Path) -> None:
        dcp.save(state.tensors(), storage_writer=dcp.FileSystemWriter(folder, sync_files=True))

    def restore(self, state: State, folder: Path) -> None:
        tensors: dict[str, Any] = state.tensors()
        dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder))
        state.model.load_state_dict(tensors["model"])
        state.optimizer.load_state_dict(tensors["optimizer"])


KINDS = {"hpc_absa": Ours, "torch": Torch, "dcp": Dcp}


def main() -> None:
    model, scratch, kind = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    comm = connect()
    training = Training(model, 32, 2)
    folder = scratch / f"{kind}-{os.getppid()}"
    folder.mkdir(exist_ok=True)
    contender = KINDS[kind](comm)
    first, path = folder / "first", folder / "second"
    for each in (first, path):
        each.mkdir(exist_ok=True)
    contender.save(training.state, first)  # reserves memory
    saved = _seconds(comm, lambda: contender.save(training.state, path))
    wanted = _checksum(training.state)
    training.step()
    _forget(folder)
    before = _bytes_read()
    restored = _seconds(comm, lambda: contender.restore(training.state, path))
    read = sum(comm.allgather_object(_bytes_read() - before))
    if not all(comm.allgather_object(_checksum(training.state) == wanted)):
        raise SystemExit("the restored state is not the saved one")
    if comm.rank == 0:
        shutil.rmtree(folder)
        print(json.dumps({"save": saved, "restore": restored, "read": read / 1e6}))
    comm.close()


def _seconds(comm: Communicator, action: Callable[[], None]) -> float:
    """Until all ranks have done it."""
    comm.allgather_object(None)
    start = time.perf_counter()
    action()
    comm.allgather_object(None)
    return time.perf_counter() - start


def _checksum(state: State) -> float:
    momentum = [each["momentum_buffer"] for each in state.optimizer.state.values()]
    tensors = [*state.model.state_dict().values(), *momentum]
    return sum(float(tensor.double().abs().sum()) for tensor in tensors)


def _forget(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def _bytes_read() -> int:
    """From files, by this process."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


if __name__ == "__main__":
    main()
