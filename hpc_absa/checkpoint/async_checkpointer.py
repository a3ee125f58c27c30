"""Saving while training continues: a snapshot in memory, then a background thread on each rank.

All ranks have the same state. A small one is written by rank 0. Of a large one each rank copies and
writes a part, and rank 0 publishes the file that links to the parts once all of them are on disk.
The progress of the threads is exchanged with the sums of every step (`flags`, `update`), so that
all ranks act on it together.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hpc_absa.checkpoint.format import Content, Group, Key, Written
from hpc_absa.checkpoint.manager import CheckpointManager, Published, assign_shards, shard_count
from hpc_absa.comm import Communicator
from hpc_absa.errors import CollectiveError, ExitStatus, HpcAbsaError
from hpc_absa.rundir.lock import host

T = TypeVar("T")


class HostCopies:
    """Copies of tensors in host memory that is kept from one snapshot to the next.

    New memory is what a copy waits for: 0.8 GB/s into new pages, 12 GB/s into existing ones (AMD
    EPYC, virtual machine).
    """

    def __init__(self) -> None:
        self._copies: dict[Key, Tensor] = {}

    def take(self, tensors: Mapping[Key, Tensor]) -> dict[Key, np.ndarray]:
        """Copy `tensors`; the arrays are valid until the next call, bfloat16 as its bits."""
        for key, tensor in tensors.items():
            copy = self._copies.get(key)
            if copy is None or (copy.shape, copy.dtype) != (tensor.shape, tensor.dtype):
                pinned = tensor.is_cuda
                self._copies[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        copies = {key: self._copies[key] for key in tensors}
        if tensors:
            with torch.no_grad():  # in one call: a model has hundreds of tensors
                torch._foreach_copy_(
                    list(copies.values()), list(tensors.values()), non_blocking=True
                )
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {
            key: (copy.view(torch.uint16) if copy.dtype == torch.bfloat16 else copy).numpy()
            for key, copy in copies.items()
        }


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
        self._pending: PendingSave | None = None

    def save(
        self,
        path: Path,
        scalars: Content,
        tensors: Mapping[Key, Tensor],
        on_saved: Callable[[Published], None],
    ) -> None:
        """Start to publish a snapshot at `path`, after the previous save has ended.

        Args:
            path: the checkpoint's file.
            scalars: the content without arrays.
            tensors: copied before this returns.
            on_saved: called on rank 0 once the checkpoint is on disk.

        Raises:
            CollectiveError: a save failed, and the job stops then.
        """
        self.settle()
        rank = self._comm.rank
        sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
        count = shard_count(sum(sizes.values()), self._comm.size, self._shard_bytes)
        shares = assign_shards(sizes, count) if count else []
        in_shards = {key for share in shares for key in share}
        mine = shares[rank] if rank < count else []
        here = [key for key in tensors if key not in in_shards] if rank == 0 else []
        arrays = self._copies.take({key: tensors[key] for key in [*here, *mine]})
        content = scalars.with_arrays({key: arrays[key] for key in here})
        self._pending = PendingSave(path, not count, time.perf_counter(), content, on_saved)
        save = self._comm.broadcast_object(secrets.token_hex(4)) if count else ""
        if mine:
            groups = {name: Group() for name, _ in mine}
            shard = Content({"step": scalars.attributes["step"]}, groups)
            shard = shard.with_arrays({key: arrays[key] for key in mine})
            self._pending.shard = self._start(
                lambda: self._manager.write_shard(path, save, rank + 1, count, shard)
            )
        if rank == 0 and not count:
            self._publish(self._pending, ())

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

    def _complete(self, pending: PendingSave) -> None:
        """All shards are on disk: rank 0 publishes the file that links to them."""
        shards = self._comm.allgather_object(pending.shard.result() if pending.shard else None)
        pending.complete = True
        if self._comm.rank == 0:
            self._publish(pending, tuple(shard for shard in shards if shard))

    def _publish(self, pending: PendingSave, shards: tuple[Written, ...]) -> None:
        def publish() -> None:
            published = self._manager.publish(pending.path, pending.content, shards)
            seconds = time.perf_counter() - pending.start
            pending.on_saved(replace(published, seconds=seconds))

        pending.publishing = self._start(publish)

    def _start(self, function: Callable[[], T]) -> Future[T]:
        future = self._thread.submit(function)
        if not self._background:
            wait([future])
        return future

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
