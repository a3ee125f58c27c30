"""Saving while training continues: a snapshot in memory, then a write in the background.

All ranks have the same state. A small one is written by rank 0. Of a large one each rank copies and
writes a part, and rank 0 publishes the file that links to the parts once all of them are on disk.
The progress of the writes is exchanged with the sums of every step (`flags`, `update`), so that
all ranks act on it together. A thread of each rank waits for a process that writes (`Writer`); it
writes itself where little is to be written, or where training waits for it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_absa.checkpoint import file
from hpc_absa.checkpoint.format import Content, Group, Key, Written
from hpc_absa.checkpoint.manager import (
    CheckpointManager,
    Published,
    Write,
    assign_shards,
    shard_count,
)
from hpc_absa.checkpoint.restore import as_array
from hpc_absa.checkpoint.writer import SharedMemory, Writer
from hpc_absa.comm import Communicator
from hpc_absa.errors import CollectiveError, ExitStatus, HpcAbsaError
from hpc_absa.rundir.lock import host

ALIGNMENT = 64
"""Bytes, of each copy in memory."""

WRITER_BYTES = 16 << 20
"""Bytes from which on a process writes beside training; it takes 0.3 s to start and 45 MB."""


class HostCopies:
    """Copies of tensors in shared memory, which is kept from one snapshot to the next."""

    def __init__(self) -> None:
        self.memory = SharedMemory()
        self._copies: dict[Key, Tensor] = {}
        self._page_locked: np.ndarray | None = None

    def reserve(self, tensors: Mapping[Key, Tensor]) -> dict[Key, np.ndarray]:
        """Where `copy` will put `tensors`: valid until the next call, bfloat16 as its bits."""
        if _kinds(self._copies) != _kinds(tensors):
            self._copies = self._allocate(tensors)
        return {key: as_array(copy) for key, copy in self._copies.items()}

    def copy(self, tensors: Mapping[Key, Tensor]) -> None:
        """Copy the `tensors` that memory was reserved for."""
        if tensors:
            with torch.no_grad():  # in one call: a model has hundreds of tensors
                torch._foreach_copy_(
                    list(self._copies.values()), list(tensors.values()), non_blocking=True
                )
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

    def _allocate(self, tensors: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Memory for a copy of each of `tensors`."""
        sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values()]
        memory = self.memory.map(sum(sizes))
        if any(tensor.is_cuda for tensor in tensors.values()):
            self._lock_pages(memory)
        pieces = torch.from_numpy(memory)[: sum(sizes)].split(sizes)
        return {
            key: piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for (key, tensor), piece in zip(tensors.items(), pieces, strict=True)
        }

    def _lock_pages(self, memory: np.ndarray) -> None:
        """So that a GPU copies into them at full speed."""
        if memory is self._page_locked:
            return
        runtime = torch.cuda.cudart()
        if self._page_locked is not None:
            runtime.cudaHostUnregister(self._page_locked.ctypes.data)
        runtime.cudaHostRegister(memory.ctypes.data, len(memory), 0)
        self._page_locked = memory


def _kinds(tensors: Mapping[Key, Tensor]) -> list[tuple[Key, torch.Size, torch.dtype]]:
    return [(key, tensor.shape, tensor.dtype) for key, tensor in tensors.items()]


@dataclass
class PendingSave:
    """A save in progress; the first two fields are the same on all ranks."""

    path: Path
    complete: bool
    """Whether rank 0 has all it needs to publish the checkpoint."""
    start: float
    content: Content
    """What rank 0 writes into the checkpoint's own file."""
    on_saved: Callable[[Published], None]
    write: Write
    """Of this rank's files."""
    shard: Future[Written] | None = None
    publishing: Future[None] | None = None

    @property
    def writes(self) -> list[Future[Any]]:
        return [write for write in (self.shard, self.publishing) if write]


class AsyncCheckpointer:
    """Saves of all ranks together, at most one in progress.

    All methods but `flags` and `wait` are collectives.
    """

    def __init__(
        self,
        manager: CheckpointManager,
        comm: Communicator,
        *,
        background: bool,
        shard_bytes: int,
        on_error: str,
        warn: Callable[[str], None],
    ) -> None:
        """
        Args:
            manager: of the run's checkpoints.
            comm: all ranks.
            background: write while training continues.
            shard_bytes: a state of twice this size is written by several ranks.
            on_error: `stop` ends the run when a save fails, `continue` calls `warn`.
            warn: called with one line for each save that failed.
        """
        self._manager, self._comm = manager, comm
        self._background, self._shard_bytes = background, shard_bytes
        self._on_error, self._warn = on_error, warn
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._copies = HostCopies()
        self._writer = Writer(self._copies.memory)
        self._pending: PendingSave | None = None

    def save(
        self,
        path: Path,
        scalars: Content,
        tensors: Mapping[Key, Tensor],
        on_saved: Callable[[Published], None],
        *,
        training: bool = True,
    ) -> None:
        """Start to publish a snapshot at `path`, after the previous save has ended.

        Args:
            path: the checkpoint's file.
            scalars: the content without arrays.
            tensors: copied before this returns.
            on_saved: called on rank 0 once the checkpoint is on disk.
            training: whether training continues meanwhile, or waits for this save.

        Raises:
            CollectiveError: a save failed, and the job stops then.
        """
        self.settle()
        start, rank = time.perf_counter(), self._comm.rank
        sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
        count = shard_count(sum(sizes.values()), self._comm.size, self._shard_bytes)
        shares = assign_shards(sizes, count) if count else []
        in_shards = {key for share in shares for key in share}
        mine = shares[rank] if rank < count else []
        here = [key for key in tensors if key not in in_shards] if rank == 0 else []
        copied: Future[None] = Future()
        taken = {key: tensors[key] for key in [*here, *mine]}
        arrays = self._copies.reserve(taken)
        content = scalars.with_arrays({key: arrays[key] for key in here})
        in_process = not training or sum(sizes[key] for key in taken) < WRITER_BYTES
        write = partial(self._write(in_process), ready=copied.result)
        self._pending = PendingSave(path, not count, start, content, on_saved, write)
        save = self._comm.broadcast_object(secrets.token_hex(4)) if count else ""
        if mine:
            groups = {name: Group() for name, _ in mine}
            shard = Content({"step": scalars.attributes["step"]}, groups)
            shard = shard.with_arrays({key: arrays[key] for key in mine})
            self._pending.shard = self._thread.submit(
                self._manager.write_shard, path, save, rank + 1, count, shard, write
            )
        if rank == 0 and not count:
            self._publish(self._pending, ())
        try:  # while the file is laid out
            self._copies.copy(taken)
        except BaseException as error:
            copied.set_exception(error)
            raise
        copied.set_result(None)
        if not self._background:
            self.wait()

    def flags(self) -> tuple[bool, bool]:
        """Of this rank: whether its shard is on disk, and whether any of its writes failed."""
        pending = self._pending
        if pending is None:
            return True, False
        failed = any(write.done() and write.exception() for write in pending.writes)
        return pending.shard is None or (pending.shard.done() and not failed), failed

    def update(self, written: int, failed: int) -> None:
        """Act on the number of ranks with each flag set, which is the same on all ranks.

        Raises as `save`.
        """
        pending = self._pending
        if failed:
            self.settle()
        elif pending and not pending.complete and written == self._comm.size:
            self._complete(pending)

    def settle(self) -> bool:
        """Wait until no save is in progress; whether the last one, if any, is on disk.

        Raises as `save`.
        """
        pending = self._pending
        if pending is None:
            return True
        error = self._first_error(pending.shard)
        if not error and not pending.complete:
            self._complete(pending)
        error = error or self._first_error(pending.publishing)
        self._pending = None
        if error is None:
            return True
        if self._on_error == "stop":
            raise CollectiveError(error, ExitStatus.FAILED)
        self._warn(f"{error}; training continues without the checkpoint {pending.path.name}")
        return False

    def wait(self) -> None:
        """Return once this rank writes nothing any more; not a collective."""
        wait(self._pending.writes if self._pending else [])

    def close(self) -> None:
        """End the process that writes, if there is one; it also ends with this one."""
        self._writer.close()

    def _write(self, in_process: bool) -> Callable[..., Written]:
        """How this rank writes a file."""
        if self._background and not in_process:
            with suppress(OSError):  # where it cannot be started, this process writes
                self._writer.start()
                return self._writer.write
        return file.write

    def _complete(self, pending: PendingSave) -> None:
        """All shards are on disk: rank 0 publishes the file that links to them."""
        shards = self._comm.allgather_object(pending.shard.result() if pending.shard else None)
        pending.complete = True
        if self._comm.rank == 0:
            self._publish(pending, tuple(shard for shard in shards if shard))
            if not self._background:
                self.wait()

    def _publish(self, pending: PendingSave, shards: tuple[Written, ...]) -> None:
        def publish() -> None:
            published = self._manager.publish(pending.path, pending.content, shards, pending.write)
            seconds = time.perf_counter() - pending.start
            pending.on_saved(replace(published, seconds=seconds))

        pending.publishing = self._thread.submit(publish)

    def _first_error(self, write: Future[Any] | None) -> str | None:
        """The error of the first rank whose `write` failed, on every rank; waits for it to end."""
        error = None
        try:
            if write:
                write.result()
        except (HpcAbsaError, OSError) as raised:
            error = f"rank {self._comm.rank} on {host()}: {raised}"
        return next((e for e in self._comm.allgather_object(error) if e), None)


def require_durable(checkpointer: AsyncCheckpointer, save: Callable[[], None]) -> None:
    """Return once the present state is on disk, with a second attempt if it is not.

    Raises:
        CollectiveError: on all ranks, where it cannot be saved.
    """
    if checkpointer.settle():
        return
    save()
    if not checkpointer.settle():
        raise CollectiveError(
            "the state could not be saved, so the run cannot continue elsewhere", ExitStatus.FAILED
        )
