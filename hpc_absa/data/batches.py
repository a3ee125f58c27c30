"""Microbatches for training, and shares of the test set, as tensors on the model's device.

Shapes: b samples of a microbatch, C channels, H × W pixels; other data is [b, C, ...] or [b, F].
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_absa.data.augment import augment, normalise
from hpc_absa.data.order import permutation
from hpc_absa.data.packed import PackedDataset, Split

Pair = tuple[torch.Tensor, torch.Tensor]
"""Inputs float32 [b, C, H, W], normalised, and targets int64 [b]."""


class Segment(Protocol):
    """Positions [start, stop) of one epoch's order (`hpc_absa.progress.Segment`)."""

    @property
    def epoch(self) -> int:
        """From 0."""

    @property
    def start(self) -> int:
        """First position."""

    @property
    def stop(self) -> int:
        """One past the last position."""


class Course(Protocol):
    """Which positions a microbatch consists of (`hpc_absa.progress.Course`)."""

    def segments(self, k: int, /) -> tuple[Segment, ...]:
        """Of the k-th microbatch, in order; two where it straddles an epoch's end."""
        ...


@dataclass(frozen=True)
class Microbatch:
    """The samples of one forward and backward pass on one rank."""

    inputs: torch.Tensor
    """float32 [b, C, H, W], augmented and normalised, on the device."""
    targets: torch.Tensor
    """int64 [b], on the device."""
    samples: NDArray[np.int64]
    """[b], indices into the training set."""
    epochs: NDArray[np.int64]
    """[b], the epoch to which each visit belongs."""


class Batches:
    """What a rank reads of a data set; the same bits for microbatch k whichever rank asks."""

    def __init__(
        self,
        dataset: PackedDataset,
        course: Course,
        seed: int,
        *,
        padding: int,
        flip: bool,
        device: torch.device,
        channels_last: bool = False,
    ) -> None:
        """Set up; nothing is read yet.

        Args:
            dataset: Of whose training set the course decides what comes when.
            course: Deals the epochs' orders out to microbatches.
            seed: Of order and augmentation.
            padding: Pixels, for the random crop of pictures (`augment`); other data is left alone.
            flip: Whether pictures are mirrored at random.
            device: Where tensors end up.
            channels_last: Memory layout of [b, C, H, W] inputs.
        """
        self.dataset = dataset
        self._course, self._seed, self._device = course, seed, device
        self._padding = padding if dataset.is_image else 0
        self._flip = flip and dataset.is_image
        self._channels_last = channels_last and len(dataset.shape) == 3
        self._mean = torch.tensor(dataset.mean, device=device)
        self._std = torch.tensor(dataset.std, device=device)
        self._orders: dict[int, NDArray[np.int64]] = {}

    def microbatch(self, k: int) -> Microbatch:
        """The k-th microbatch of the course, augmented."""
        segments = self._course.segments(k)
        samples = np.concatenate([self._order(s.epoch)[s.start : s.stop] for s in segments])
        epochs = np.concatenate([np.full(s.stop - s.start, s.epoch, np.int64) for s in segments])
        images = torch.from_numpy(self.dataset.train.images[samples])
        if self._padding or self._flip:
            images = augment(images, self._seed, epochs, samples, self._padding, self._flip)
        targets = torch.from_numpy(self.dataset.train.labels[samples])
        return Microbatch(self._inputs(images), self._moved(targets), samples, epochs)

    def prefetch(self, ks: Iterable[int]) -> Iterator[Microbatch]:
        """The microbatches `ks`, in order, each prepared while the one before it is in use.

        An exception in the preparation is raised where its microbatch is asked for. The thread
        ends with the generator: exhausted, closed or given up.
        """
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as thread:
            ahead: Future[Microbatch] | None = None
            for k in ks:
                ready, ahead = ahead, thread.submit(self.microbatch, k)
                if ready is not None:
                    yield ready.result()
            if ahead is not None:
                yield ahead.result()

    def evaluation(self, rank: int, size: int, batch: int) -> Iterator[Pair]:
        """This rank's share of the test set, as it is; all shares together are every image once.

        Whole batches are dealt out, so that a batch, and with it every bit of a loss computed from
        it, does not depend on the number of ranks. Some ranks may get one batch fewer, or none.

        Args:
            rank: From 0.
            size: Number of ranks.
            batch: Images in a batch; the test set's last one may have fewer.
        """
        test = self.dataset.test
        for start in range(rank * batch, len(test), size * batch):
            yield self._pair(test, np.arange(start, min(start + batch, len(test))))

    def sample(self, indices: NDArray[np.int64]) -> Pair:
        """Training samples as they are, without augmentation: for the Hessian."""
        return self._pair(self.dataset.train, indices)

    @property
    def pixel_range(self) -> Pair:
        """The normalised values of black and of white, [1, C, 1, 1] each; infinite for other data.

        No input is outside: they are computed in the same way as the inputs.
        """
        shape = (1, self.dataset.channels, *(1,) * (len(self.dataset.shape) - 1))
        if not self.dataset.is_image:
            infinite = torch.full(shape, torch.inf, device=self._device)
            return -infinite, infinite
        low, high = (
            torch.full(shape, value, dtype=torch.uint8, device=self._device) for value in (0, 255)
        )
        return normalise(low, self._mean, self._std), normalise(high, self._mean, self._std)

    @property
    def pixel_scale(self) -> torch.Tensor:
        """float32 [1, C, 1, 1]: how far an input moves when its pixel (0 to 1) moves by one."""
        shape = (1, self.dataset.channels, *(1,) * (len(self.dataset.shape) - 1))
        return (1.0 / self._std).float().view(shape)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """An epoch's order; its neighbours are kept for microbatches that straddle its end."""
        order = self._orders.get(epoch)
        if order is None:
            order = permutation(self._seed, epoch, len(self.dataset.train))
            # A new dictionary, because the prefetching thread may be reading the old one.
            near = {e: kept for e, kept in self._orders.items() if abs(e - epoch) == 1}
            self._orders = {**near, epoch: order}
        return order

    def _pair(self, split: Split, indices: NDArray[np.int64]) -> Pair:
        images = torch.from_numpy(split.images[indices])
        return self._inputs(images), self._moved(torch.from_numpy(split.labels[indices]))

    def _inputs(self, images: torch.Tensor) -> torch.Tensor:
        """Bytes travel to the device, a quarter of what their float32 would be."""
        return normalise(self._moved(images), self._mean, self._std, self._channels_last)

    def _moved(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)
