"""Random crop and flip of batches; a function of (seed, epoch, sample index) for each image.

Shapes: b images, C channels, H × W pixels, p pixels of padding on every side.
"""

from __future__ import annotations

import math
import weakref
from collections import deque
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_absa.data.order import uniform

_ROW, _COLUMN, _FLIP = 0, 1, 2  # streams of random numbers

BLOCK_BYTES = 2**17
"""Of images that are normalised at a time."""


def augment(
    images: NDArray[np.uint8],
    seed: int,
    epochs: NDArray[np.int64],
    samples: NDArray[np.int64],
    padding: int,
    flip: bool,
) -> NDArray[np.uint8]:
    """Crop H × W out of each image padded with black, and mirror half of the images left to right.

    The augmentation of He et al. 2016 (section 4.2) for padding = 4. What happens to an image does
    not depend on the other images of its batch, on the rank, or on the calls before.

    Args:
        images: uint8 [b, C, H, W]; not changed, and returned without padding, flip.
        seed: The job's.
        epochs: [b], the epoch that each image belongs to.
        samples: [b], each image's index in the training set.
        padding: p ≥ 0, in pixels; 0 means no crop.
        flip: Whether to mirror.
    """
    if padding == 0 and not flip:
        return images
    if padding:
        offsets = 2 * padding + 1
        rows, columns = (
            (uniform(seed, epochs, samples, stream) * offsets).astype(np.intp) - padding
            for stream in (_ROW, _COLUMN)
        )
        images = _moved(images, rows, columns)
    if flip:
        images = images if padding else images.copy()
        mirrored = np.flatnonzero(uniform(seed, epochs, samples, _FLIP) < 0.5)
        images[mirrored] = torch.from_numpy(images[mirrored]).flip(-1)  # faster than numpy's
    return images


def _moved(
    images: NDArray[np.uint8], rows: NDArray[np.intp], columns: NDArray[np.intp]
) -> NDArray[np.uint8]:
    """Image i moved up by rows[i] and to the left by columns[i]; what comes in is black."""
    result = np.zeros_like(images)
    height, width = images.shape[2:]
    for i, (row, column) in enumerate(zip(rows.tolist(), columns.tolist(), strict=True)):
        target = result[i, :, max(0, -row) :, max(0, -column) :]
        source = images[i, :, max(0, row) :, max(0, column) :]
        h, w = max(0, height - abs(row)), max(0, width - abs(column))
        target[:, :h, :w] = source[:, :h, :w]
    return result


def normalise(
    images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, channels_last: bool = False
) -> torch.Tensor:
    """`(images / 255 − mean) / std` for uint8 images, `(images − mean) / std` for float data.

    Computed as one product and one sum, each rounded, so that a pixel's value does not depend on
    its place in the batch (with a fused multiply-add in some lanes of a vector it would).

    Args:
        images: [b, C, ...], any device; the result is float32.
        mean: [C] on that device, in pixel units (0 black, 1 white).
        std: [C] likewise.
        channels_last: Store [b, C, H, W] as NHWC in memory.
    """
    scale, shift = scale_and_shift(mean, std, 255 if images.dtype == torch.uint8 else 1)
    channels = (1, -1, *(1,) * (images.dim() - 2))
    values = images.to(torch.float32, copy=True)
    values.mul_(scale.view(channels)).add_(shift.view(channels))
    # Last, because arithmetic over three interleaved channels is ten times slower.
    return values.contiguous(memory_format=torch.channels_last) if channels_last else values


def scale_and_shift(
    mean: torch.Tensor, std: torch.Tensor, unit: float = 255
) -> tuple[torch.Tensor, torch.Tensor]:
    """The a and b of `a · x + b`, float32 [C], for values x of which `unit` is a white pixel's."""
    return (1.0 / (std.double() * unit)).float(), (-mean.double() / std.double()).float()


class Buffers:
    """Memory for batches, reused once a batch has been freed: the pages of new memory have to be
    cleared first, which takes as long as to normalise an image.
    """

    def __init__(self) -> None:
        self._free: deque[NDArray[np.float32]] = deque(maxlen=4)

    def empty(self, shape: tuple[int, ...], channels_last: bool = False) -> NDArray[np.float32]:
        """[b, C, H, W]; to be given to `torch.from_numpy` itself and not as a view."""
        buffer = None
        with suppress(IndexError):
            buffer = self._free.pop()
        if buffer is None or len(buffer) != math.prod(shape):
            buffer = _aligned(math.prod(shape))
        if channels_last:
            b, c, h, w = shape
            batch = buffer.reshape(b, h, w, c).transpose(0, 3, 1, 2)
        else:
            batch = buffer.reshape(shape)
        weakref.finalize(batch, self._free.append, buffer).atexit = False
        return batch


def _aligned(count: int) -> NDArray[np.float32]:
    """Aligned to 64 bytes like torch's tensors.

    numpy asks for huge pages, torch does not: filling a new tensor then takes three times as long.
    """
    buffer = np.empty(count + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4
    return buffer[start : start + count]


def normalise_into(
    result: NDArray[np.float32],
    images: NDArray[np.uint8],
    scale: NDArray[np.float32],
    shift: NDArray[np.float32],
) -> None:
    """As `normalise`, into `result` [b, C, H, W], in blocks that fit into a core's cache."""
    b, c, h, w = images.shape
    block = max(1, BLOCK_BYTES // (c * h * w))
    interleaved = result.strides[1] < result.strides[3]
    if interleaved:  # rows [W · C]: arithmetic over three elements at a time is slow
        result = result.transpose(0, 2, 3, 1).reshape(b, h, w * c)
        scale, shift = np.tile(scale, w), np.tile(shift, w)
    else:
        scale, shift = scale.reshape(c, 1, 1), shift.reshape(c, 1, 1)
    for k in range(0, b, block):
        part, values = images[k : k + block], result[k : k + block]
        if interleaved:
            part = _interleaved(part).reshape(values.shape)
        np.multiply(part, scale, out=values, dtype=np.float32)
        np.add(values, shift, out=values)


def _interleaved(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[b, C, H, W] as [b, H, W, C]; copied by channels, as copying by pixels is slow."""
    result = images.transpose(0, 2, 3, 1)
    if result.flags.c_contiguous:
        return result
    result = np.empty_like(result, order="C")
    for channel in range(images.shape[1]):
        result[..., channel] = images[:, channel]
    return result
