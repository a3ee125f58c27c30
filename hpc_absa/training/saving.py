"""Saving while training goes on: a snapshot in memory, then a background thread on each rank.

Every rank holds the same state. A small one is written by rank 0; of a large one each rank copies
and writes its share, and rank 0 publishes the file that points to the shares once all of them are
durable. What the threads have come to travels with every step's sums (`flags`, `heard`), so that
all ranks act on it together.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from hpc_absa.checkpoint import Content, Group, Key, Published, Shard, Store, shards
from hpc_absa.comm import Communicator
from hpc_absa.errors import CollectiveError, ExitStatus, HpcAbsaError
from hpc_absa.rundir.lock import host

T = TypeVar("T")


class Task(Generic[T]):
    """A piece of work in a thread of its own, or done at once."""

    def __init__(self, work: Callable[[], T], *, background: bool) -> None:
        """Begins the work."""
        self._value: T | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        if background:
            self._thread.start()
        else:
            self._run(work)

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error."""
        return self.done and self._error is not None

    def wait(self) -> None:
        """Return once it has ended, well or not."""
        if self._thread.ident is not None:
            self._thread.join()

    def result(self) -> T:
        """What the work returned, waiting for it; raises what it raised."""
        self.wait()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._value = work()
        except Exception as error:
            self._error = error


class HostCopies:
    """Copies of tensors in host memory that stays from one snapshot to the next.

    Fresh memory is what a copy waits for: 0.8 GB/s where the pages are new, 12 GB/s where they are
    there already (AMD EPYC, virtual machine).
    """

    def __init__(self) -> None:
        """Nothing is held yet."""
        self._held: dict[Key, Tensor] = {}
        self._views: dict[Key, np.ndarray] = {}

    def take(self, tensors: Mapping[Key, Tensor]) -> dict[Key, np.ndarray]:
        """Copy `tensors`; the arrays are valid until the next call. bfloat16 comes as its bits."""
        for key, tensor in tensors.items():
            held = self._held.get(key)
            if held is None or (held.shape, held.dtype) != (tensor.shape, tensor.dtype):
                self._hold(key, tensor)
        if tensors:
            copies = [self._held[key] for key in tensors]
            with torch.no_grad():  # all in one call: a model has hundreds
                torch._foreach_copy_(copies, list(tensors.values()), non_blocking=True)
        if any(tensor.device.type == "cuda" for tensor in tensors.values()):
            torch.cuda.synchronize()
        return {key: self._views[key] for key in tensors}

    def _hold(self, key: Key, like: Tensor) -> None:
        pinned = like.device.type == "cuda"
        held = torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
        self._held[key] = held
        bits = held.view(torch.uint16) if held.dtype == torch.bfloat16 else held
        self._views[key] = bits.numpy()


@dataclass(frozen=True)
class Flight:
    """A save that has begun; the same on all ranks."""

    path: Path
    shards: int
    """0 where rank 0 writes everything into one file."""
    begun: float
    indexed: bool
    """Whether rank 0 has been given all it needs to publish."""


class Saver:
    """Saves of one world, at most one in flight; all but `flags` and `wait` are collectives."""

    def __init__(
        self,
        store: Store,
        comm: Communicator,
        *,
        background: bool,
        shard_bytes: int,
        on_error: str,
        warn: Callable[[str], None],
    ) -> None:
        """Put together by `worker.work`.

        Args:
            store: the run's checkpoints.
            comm: the world.
            background: write while training goes on.
            shard_bytes: a state of twice this is written by several ranks.
            on_error: `stop` ends the run where a save fails, `continue` tells `warn`.
            warn: gets one line for each save that failed.
        """
        self._store, self._comm = store, comm
        self._background, self._shard_bytes = background, shard_bytes
        self._on_error, self._warn = on_error, warn
        self._copies = HostCopies()
        self._flight: Flight | None = None
        self._own: Task[Shard] | None = None
        self._publishing: Task[None] | None = None
        self._rest = Content({}, {})
        self._then: Callable[[Published], None] = _ignored

    def save(
        self,
        path: Path,
        scalars: Content,
        tensors: Mapping[Key, Tensor],
        then: Callable[[Published], None],
    ) -> None:
        """Begin to publish a snapshot of `tensors` with `scalars` at `path`.

        Waits for the save before it. `then` is called on rank 0 once the checkpoint is durable.

        Raises:
            CollectiveError: on all ranks, where a save failed and the job wants to stop then.
        """
        self.settle()
        sizes = {key: tensor.numel() * tensor.element_size() for key, tensor in tensors.items()}
        count = shards.count(sum(sizes.values()), self._comm.size, self._shard_bytes)
        shares = shards.assign(sizes, count) if count else []
        self._flight = Flight(path, count, time.perf_counter(), indexed=not count)
        elsewhere = {key for share in shares for key in share}
        rank = self._comm.rank
        mine = shares[rank] if rank < count else []
        here = [key for key in tensors if key not in elsewhere] if rank == 0 else []
        arrays = self._copies.take({key: tensors[key] for key in [*here, *mine]})
        save = self._comm.broadcast_object(secrets.token_hex(4)) if count else ""
        if mine:
            share = _share(scalars, {key: arrays[key] for key in mine})
            self._own = Task(
                lambda: self._store.write_shard(path, save, rank + 1, count, share),
                background=self._background,
            )
        if rank == 0:
            self._rest = _with_arrays(scalars, {key: arrays[key] for key in here})
            self._then = then
            if not count:
                self._publish(())

    def flags(self) -> tuple[bool, bool]:
        """Of this rank: whether its share is durable, and whether its work has failed."""
        tasks = [task for task in (self._own, self._publishing) if task]
        share = self._own is None or (self._own.done and not self._own.failed)
        return share, any(task.failed for task in tasks)

    def heard(self, written: int, failed: int) -> None:
        """Act on how many ranks' flags were set: the same numbers on every rank.

        Raises:
            CollectiveError: as `save`.
        """
        if failed:
            self.settle()
        elif self._flight and not self._flight.indexed and written == self._comm.size:
            self._index()

    def settle(self) -> bool:
        """Return once nothing is in flight; whether the last save, if any, is durable.

        Raises:
            CollectiveError: as `save`.
        """
        if self._flight is None:
            return True
        error = self._first_error(self._own)
        if not error and not self._flight.indexed:
            self._index()
        error = error or self._first_error(self._publishing)
        path = self._flight.path
        self._flight = self._own = self._publishing = None
        if error is None:
            return True
        if self._on_error == "stop":
            raise CollectiveError(error, ExitStatus.FAILED)
        self._warn(f"{error}; training goes on, and {path.name} is not among the checkpoints")
        return False

    def wait(self) -> None:
        """Return once this rank writes nothing, well or not; no collective."""
        for task in (self._own, self._publishing):
            if task:
                task.wait()

    def _index(self) -> None:
        """Every share is durable: rank 0 publishes the file that points to them."""
        assert self._flight is not None
        parts = self._comm.allgather_object(self._own.result() if self._own else None)
        self._flight = replace(self._flight, indexed=True)
        if self._comm.rank == 0:
            self._publish(tuple(part for part in parts if part))

    def _publish(self, parts: tuple[Shard, ...]) -> None:
        assert self._flight is not None
        flight, rest, then = self._flight, self._rest, self._then

        def work() -> None:
            published = self._store.publish(flight.path, rest, parts)
            then(replace(published, seconds=time.perf_counter() - flight.begun))

        self._publishing = Task(work, background=self._background)

    def _first_error(self, task: Task[T] | None) -> str | None:
        """What the first rank's `task` ran into, on every rank."""
        error = None
        try:
            if task:
                task.result()
        except (HpcAbsaError, OSError) as raised:
            error = f"rank {self._comm.rank} on {host()}: {raised}"
        return next((e for e in self._comm.allgather_object(error) if e), None)


def require_durable(saver: Saver, again: Callable[[], None]) -> None:
    """Return once the present state is on disk, trying once more where it is not.

    Raises:
        CollectiveError: on all ranks, where it cannot be saved.
    """
    if saver.settle():
        return
    again()
    if not saver.settle():
        raise CollectiveError(
            "the state could not be saved, so the run cannot go on elsewhere", ExitStatus.FAILED
        )


def _with_arrays(scalars: Content, arrays: Mapping[Key, np.ndarray]) -> Content:
    groups = {
        name: Group(group.attributes, {key: a for (of, key), a in arrays.items() if of == name})
        for name, group in scalars.groups.items()
    }
    return Content(scalars.attributes, groups)


def _share(scalars: Content, arrays: Mapping[Key, np.ndarray]) -> Content:
    """A shard: arrays under the names they have in the whole, and the whole's step."""
    groups = {name: Group() for name, _ in arrays}
    return _with_arrays(Content({"step": scalars.attributes["step"]}, groups), arrays)


def _ignored(_: Published) -> None:
    """Nobody wants to know."""
