"""Microbatches for training, and parts of the test set, as tensors on the model's device.

Shapes: b samples of a microbatch, C channels, H × W pixels; other data is [b, C, ...] or [b, F].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_absa.data.augment import augment, normalise
from hpc_absa.data.order import permutation
from hpc_absa.data.packed import PackedDataset, Split

Pair = tuple[torch.Tensor, torch.Tensor]
"""Inputs float32 [b, C, H, W], normalised, and targets int64 [b]."""


class Stream(Protocol):
    """Which samples belong to which microbatch."""

    def segments(self, k: int, /) -> Sequence[Any]:
        """Of the k-th microbatch, in order: positions [`start`, `stop`) of the order of `epoch`."""


@dataclass(frozen=True)
class Microbatch:
    inputs: torch.Tensor
    """float32 [b, C, H, W], augmented and normalised, on the device."""
    targets: torch.Tensor
    """int64 [b], on the device."""
    samples: NDArray[np.int64]
    """[b], indices into the training set."""
    epochs: NDArray[np.int64]
    """[b], the epoch that each sample belongs to."""


class Loader:
    """Reads a data set for one rank; microbatch k has the same bits on every rank."""

    def __init__(
        self,
        dataset: PackedDataset,
        stream: Stream,
        seed: int,
        *,
        padding: int,
        flip: bool,
        device: torch.device,
        channels_last: bool = False,
    ) -> None:
        """
        Args:
            dataset: Training and test set.
            stream: Which positions of an epoch's order a microbatch has.
            seed: Of order and augmentation.
            padding: Pixels, for the random crop of images (`augment`); other data is not changed.
            flip: Whether images are mirrored at random.
            device: Of the tensors.
            channels_last: Memory layout of [b, C, H, W] inputs.
        """
        self.dataset = dataset
        self._stream, self._seed, self._device = stream, seed, device
        self._padding = padding if dataset.is_image else 0
        self._flip = flip and dataset.is_image
        self._channels_last = channels_last and len(dataset.shape) == 3
        self._mean = torch.tensor(dataset.mean, device=device)
        self._std = torch.tensor(dataset.std, device=device)
        self._orders: dict[int, NDArray[np.int64]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._prepared: dict[int, Future[Microbatch]] = {}

    def get(self, k: int, then: int | None = None) -> Microbatch:
        """Microbatch k; begins to prepare microbatch `then` in a background thread.

        A microbatch that was `then` in the previous call is taken from that thread, any other one
        is computed now. An error of the thread is raised by the call for its microbatch.
        """
        prepared = self._prepared.pop(k, None)
        for unused in self._prepared.values():
            unused.cancel()
        self._prepared = {} if then is None else {then: self._thread.submit(self._read, then)}
        return prepared.result() if prepared else self._read(k)

    def close(self) -> None:
        """Drop what is prepared, without waiting for the thread; `get` cannot be called again."""
        self._prepared = {}
        self._thread.shutdown(wait=False, cancel_futures=True)

    def evaluation(self, rank: int, size: int, batch: int) -> Iterator[Pair]:
        """This rank's part of the test set, not augmented; all parts have every image once.

        Whole batches of `batch` images are distributed, so that a batch, and every bit of a loss
        computed from it, does not depend on the number of ranks. Ranks may get different numbers.
        """
        test = self.dataset.test
        for start in range(rank * batch, len(test), size * batch):
            yield self._pair(test, np.arange(start, min(start + batch, len(test))))

    def sample(self, indices: NDArray[np.int64]) -> Pair:
        """Training samples without augmentation, for the Hessian."""
        return self._pair(self.dataset.train, indices)

    @property
    def pixel_range(self) -> Pair:
        """The normalised values of black and of white, [1, C, 1, 1] each; infinite for other data.

        No input is outside: they are computed in the same way as the inputs.
        """
        low, high = (
            torch.full(self._channel_shape, value, dtype=torch.uint8, device=self._device)
            for value in (0, 255)
        )
        if not self.dataset.is_image:
            infinite = torch.full_like(low, torch.inf, dtype=torch.float32)
            return -infinite, infinite
        return normalise(low, self._mean, self._std), normalise(high, self._mean, self._std)

    @property
    def pixel_scale(self) -> torch.Tensor:
        """float32 [1, C, 1, 1]: the change of an input when its pixel (0 to 1) changes by one."""
        return (1.0 / self._std).float().view(self._channel_shape)

    @property
    def _channel_shape(self) -> tuple[int, ...]:
        return (1, self.dataset.channels, *(1,) * (len(self.dataset.shape) - 1))

    def _read(self, k: int) -> Microbatch:
        segments = self._stream.segments(k)
        samples = np.concatenate([self._order(s.epoch)[s.start : s.stop] for s in segments])
        epochs = np.concatenate([np.full(s.stop - s.start, s.epoch, np.int64) for s in segments])
        images = torch.from_numpy(self.dataset.train.images[samples])
        images = augment(images, self._seed, epochs, samples, self._padding, self._flip)
        targets = torch.from_numpy(self.dataset.train.labels[samples])
        return Microbatch(self._inputs(images), self._to_device(targets), samples, epochs)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """An epoch's order; those next to it are kept for microbatches that straddle its end."""
        order = self._orders.get(epoch)
        if order is None:
            order = permutation(self._seed, epoch, len(self.dataset.train))
            # A new dictionary, because another thread may be reading the old one.
            near = {e: kept for e, kept in self._orders.items() if abs(e - epoch) == 1}
            self._orders = {**near, epoch: order}
        return order

    def _pair(self, split: Split, indices: NDArray[np.int64]) -> Pair:
        images = torch.from_numpy(split.images[indices])
        return self._inputs(images), self._to_device(torch.from_numpy(split.labels[indices]))

    def _inputs(self, images: torch.Tensor) -> torch.Tensor:
        """Copies bytes to the device, a quarter of what their float32 would be."""
        return normalise(self._to_device(images), self._mean, self._std, self._channels_last)

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)
