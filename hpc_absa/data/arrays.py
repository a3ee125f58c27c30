"""Reads batches of a packed data set: augmented, normalised, on the model's device.

Shapes: b samples of a batch, C channels, H × W pixels; other data is [b, C, ...] or [b, F].
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_absa.data.augment import (
    Buffers,
    augment,
    normalise,
    normalise_into,
    scale_and_shift,
)
from hpc_absa.data.loader import Batch, Indices, Part
from hpc_absa.data.packed import PackedDataset

BLOCK_BYTES = 2**20
"""Of images that are augmented and normalised at a time."""


class PackedReader:
    """A `Reader` that prepares the next batches in threads."""

    ahead = 2

    def __init__(
        self,
        dataset: PackedDataset,
        seed: int,
        *,
        padding: int,
        flip: bool,
        device: torch.device,
        channels_last: bool = False,
        input_range: tuple[float, float] | None = None,
        normalize: bool = True,
    ) -> None:
        """
        Args:
            dataset: training and test set.
            seed: of the augmentation.
            padding: pixels, for the random crop of images (`augment`); other data is not changed.
            flip: whether images are mirrored at random.
            device: of the tensors.
            channels_last: memory layout of [b, C, H, W] inputs.
            input_range: smallest and largest valid value of other data, before normalisation.
            normalize: whether to shift and scale by the data set's mean and standard deviation.
        """
        self.dataset = dataset
        self._seed, self._device = seed, device
        self._padding = padding if dataset.is_image else 0
        self._flip = flip and dataset.is_image
        self._channels_last = channels_last and len(dataset.shape) == 3
        self._range = input_range
        mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
        self._mean = (mean if normalize else torch.zeros_like(mean)).to(device)
        self._std = (std if normalize else torch.ones_like(std)).to(device)
        self._buffers = Buffers()
        self._threads = ThreadPoolExecutor(self.ahead, thread_name_prefix="loader")

    def read(self, part: Part, samples: Indices, epochs: Indices | None = None) -> Batch:
        split = self.dataset.train if part == "train" else self.dataset.test
        targets = torch.from_numpy(split.labels[samples])
        if self._device.type == "cpu" and self.dataset.is_image and len(self.dataset.shape) == 3:
            return Batch(self._host_inputs(split.images, samples, epochs), targets)
        # Bytes are copied to the device, a quarter of what their float32 would be.
        images = self._to_device(torch.from_numpy(self._images(split.images, samples, epochs)))
        inputs = normalise(images, self._mean, self._std, self._channels_last)
        return Batch(inputs, self._to_device(targets))

    def _images(self, images: Any, samples: Indices, epochs: Indices | None) -> NDArray[Any]:
        """As they are stored, and augmented in training."""
        if epochs is None:
            pixels: NDArray[Any] = images[samples]
            return pixels
        if self.dataset.is_encoded:
            return images.random_crops(samples, self._seed, epochs, self._flip)
        return augment(images[samples], self._seed, epochs, samples, self._padding, self._flip)

    def _host_inputs(self, images: Any, samples: Indices, epochs: Indices | None) -> torch.Tensor:
        """Normalised while they are in the cache."""
        buffers = Buffers() if epochs is None else self._buffers
        result = buffers.empty((len(samples), *self.dataset.shape), self._channels_last)
        scale, shift = (values.numpy() for values in scale_and_shift(self._mean, self._std))
        if self.dataset.is_encoded:

            def store(one: NDArray[np.float32], pixels: NDArray[np.uint8]) -> None:
                normalise_into(one[None], pixels[None], scale, shift)

            if epochs is None:
                images.center_crops(samples, result, store)
            else:
                images.random_crops(samples, self._seed, epochs, self._flip, result, store)
        else:
            count = max(1, BLOCK_BYTES // math.prod(self.dataset.shape))
            for k in range(0, len(samples), count):
                block = slice(k, k + count)
                of_block = None if epochs is None else epochs[block]
                pixels = self._images(images, samples[block], of_block)
                normalise_into(result[block], pixels, scale, shift)
        return torch.from_numpy(result)

    def submit(self, part: Part, samples: Indices, epochs: Indices | None = None) -> Future[Batch]:
        return self._threads.submit(self.read, part, samples, epochs)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def input_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The normalised values of black and of white, [1, C, 1, 1] each; infinite for other data.

        No input is outside: they are computed in the same way as the inputs.
        """
        if self.dataset.is_image:
            ends = torch.tensor([0, 255], dtype=torch.uint8, device=self._device)
        else:
            given = self._range or (-torch.inf, torch.inf)
            ends = torch.tensor(given, dtype=torch.float32, device=self._device)
        low, high = (end.expand(self._channel_shape) for end in ends)
        return normalise(low, self._mean, self._std), normalise(high, self._mean, self._std)

    def input_scale(self) -> torch.Tensor:
        """float32 [1, C, 1, 1]: one over the standard deviation."""
        return (1.0 / self._std).float().view(self._channel_shape)

    @property
    def _channel_shape(self) -> tuple[int, ...]:
        return (1, self.dataset.channels, *(1,) * (len(self.dataset.shape) - 1))

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            return tensor.pin_memory().to(self._device, non_blocking=True)
        return tensor.to(self._device)
