"""Microbatches for training, and parts of the test set, as tensors on the model's device.

One loader for every kind of data: it knows which samples belong to which microbatch, and its reader
turns samples into a batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_absa.data.order import permutation

Part = Literal["train", "test"]
Indices = NDArray[np.int64]


class Batch(NamedTuple):
    """Samples as a model and a loss take them, on the model's device."""

    inputs: Any
    """A tensor or any nesting of them; for packed data float32 [b, C, ...], normalised."""
    targets: Any
    """Likewise; for packed data int64 [b]. None for data without targets."""


@dataclass(frozen=True)
class Microbatch:
    inputs: Any
    targets: Any
    samples: Indices
    """[b], indices into the training set."""
    epochs: Indices
    """[b], the epoch that each sample belongs to."""


class Pending(Protocol):
    """A batch that is being read."""

    def result(self) -> Batch: ...
    def cancel(self) -> Any: ...


class Reader(Protocol):
    """Turns samples into a batch, which depends on the seed, the samples and their epochs alone."""

    ahead: int
    """How many batches are read ahead of the one in use; 0 if `submit` cannot be called."""

    def read(self, part: Part, samples: Indices, epochs: Indices | None = None) -> Batch:
        """Read now; without `epochs` there is no augmentation of ours."""
        ...

    def submit(self, part: Part, samples: Indices, epochs: Indices | None = None) -> Pending:
        """Read beside training."""
        ...

    def input_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest valid input, broadcastable to a batch of inputs; may be infinite."""
        ...

    def input_scale(self) -> torch.Tensor:
        """The change of an input when the value it was made from, such as a pixel's, changes by 1;
        broadcastable.
        """
        ...

    def close(self) -> None:
        """Drop what is being read, without waiting for it."""
        ...


class Stream(Protocol):
    """Which samples belong to which microbatch."""

    def segments(self, k: int, /) -> Sequence[Any]:
        """Of the k-th microbatch, in order: positions [`start`, `stop`) of the order of `epoch`."""


class Loader:
    """Reads a data set for one rank; microbatch k has the same bits on every rank."""

    def __init__(self, dataset: Any, reader: Reader, stream: Stream, seed: int) -> None:
        """
        Args:
            dataset: training and test set, with lengths.
            reader: of that data set.
            stream: which positions of an epoch's order a microbatch has.
            seed: of the order.
        """
        self.dataset, self.reader = dataset, reader
        self.seed = seed
        self._stream = stream
        self._orders: dict[int, Indices] = {}
        self._pending: dict[int, tuple[Pending, Indices, Indices]] = {}

    @property
    def ahead(self) -> int:
        """How many microbatches `get` can prepare at a time."""
        return self.reader.ahead

    def get(self, k: int, then: Sequence[int] = ()) -> Microbatch:
        """Microbatch k; prepares the microbatches `then` beside training, in this order.

        A microbatch that was in `then` of the previous call is taken from there, any other one is
        read now. An error while preparing a microbatch is raised by the call for it.
        """
        prepared = self._pending.pop(k, None)
        then = then[: self.ahead]
        for index in self._pending.keys() - set(then):
            self._pending.pop(index)[0].cancel()
        for index in then:
            if index not in self._pending:
                chosen = self.samples(index)
                self._pending[index] = (self.reader.submit("train", *chosen), *chosen)
        if prepared:
            pending, samples, epochs = prepared
            return Microbatch(*pending.result(), samples, epochs)
        samples, epochs = self.samples(k)
        return Microbatch(*self.reader.read("train", samples, epochs), samples, epochs)

    def close(self) -> None:
        """Drop what is prepared, without waiting for it; `get` cannot be called again."""
        self._pending = {}
        self.reader.close()

    def samples(self, k: int) -> tuple[Indices, Indices]:
        """The samples of microbatch k, and the epoch of each; [b]."""
        segments = self._stream.segments(k)
        if len(segments) == 1:
            (only,) = segments
            samples = self._order(only.epoch)[only.start : only.stop]
            return samples, np.full(len(samples), only.epoch, np.int64)
        samples = np.concatenate([self._order(s.epoch)[s.start : s.stop] for s in segments])
        epochs = np.concatenate([np.full(s.stop - s.start, s.epoch, np.int64) for s in segments])
        return samples, epochs

    def evaluation(self, rank: int, size: int, batch: int) -> Iterator[tuple[Batch, int]]:
        """This rank's part of the test set with the number of samples; all parts have each once.

        Whole batches of `batch` samples are distributed, so that a batch, and every bit of a loss
        computed from it, does not depend on the number of ranks. Ranks may get different numbers.
        """
        count = 0 if self.dataset.test is None else len(self.dataset.test)
        starts = range(rank * batch, count, size * batch)
        return self.batches(
            "test", [np.arange(start, min(start + batch, count)) for start in starts]
        )

    def batches(self, part: Part, indices: Iterable[Indices]) -> Iterator[tuple[Batch, int]]:
        """Batches of these samples, read ahead if the reader can; with their numbers of samples."""
        pending: deque[tuple[Pending, int]] = deque()
        for samples in indices:
            if not self.ahead:
                yield self.reader.read(part, samples), len(samples)
                continue
            pending.append((self.reader.submit(part, samples), len(samples)))
            if len(pending) > self.ahead:
                batch, number = pending.popleft()
                yield batch.result(), number
        for batch, number in pending:
            yield batch.result(), number

    def sample(self, indices: Indices, part: Part = "train") -> Batch:
        """Samples without augmentation of ours, such as for the Hessian."""
        return self.reader.read(part, indices)

    def _order(self, epoch: int) -> Indices:
        """An epoch's order; those next to it are kept for microbatches that straddle its end."""
        order = self._orders.get(epoch)
        if order is None:
            order = permutation(self.seed, epoch, len(self.dataset.train))
            near = {e: kept for e, kept in self._orders.items() if abs(e - epoch) == 1}
            self._orders = {**near, epoch: order}
        return order
