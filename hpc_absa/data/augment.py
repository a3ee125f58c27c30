"""Random crop and flip of batches; a function of (seed, epoch, sample index) for each image.

Shapes: b images, C channels, H × W pixels, p pixels of padding on every side.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_absa.data.order import uniform

_ROW, _COLUMN, _FLIP = 0, 1, 2  # streams of random numbers


def augment(
    images: torch.Tensor,
    seed: int,
    epochs: NDArray[np.int64],
    samples: NDArray[np.int64],
    padding: int,
    flip: bool,
) -> torch.Tensor:
    """Crop H × W out of each image padded with black, and mirror half of the images left to right.

    The augmentation of He et al. 2016 (section 4.2) for padding = 4. What happens to an image does
    not depend on the other images of its batch, on the rank, or on the calls before.

    Args:
        images: uint8 [b, C, H, W] in host memory; not changed, and returned without padding, flip.
        seed: The job's.
        epochs: [b], the epoch that each image belongs to.
        samples: [b], each image's index in the training set.
        padding: p ≥ 0, in pixels; 0 means no crop.
        flip: Whether to mirror.
    """
    if padding == 0 and not flip:
        return images
    # numpy copies windows of bytes some seven times as fast as torch's indexing on a CPU.
    pixels = images.numpy()
    if padding:
        offsets = 2 * padding + 1
        rows, columns = (
            (uniform(seed, epochs, samples, stream) * offsets).astype(np.intp)
            for stream in (_ROW, _COLUMN)
        )
        pixels = _crop(pixels, rows, columns, padding)
    if flip:
        pixels = pixels if padding else pixels.copy()
        mirrored = uniform(seed, epochs, samples, _FLIP) < 0.5
        pixels[mirrored] = pixels[mirrored][..., ::-1]
    return torch.from_numpy(pixels)


def _crop(
    pixels: NDArray[np.uint8], rows: NDArray[np.intp], columns: NDArray[np.intp], padding: int
) -> NDArray[np.uint8]:
    """The window at (rows[i], columns[i]) of the padded image i."""
    b, channels, height, width = pixels.shape
    padded = np.zeros((b, channels, height + 2 * padding, width + 2 * padding), np.uint8)
    padded[:, :, padding : padding + height, padding : padding + width] = pixels
    windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width), axis=(2, 3))
    return np.ascontiguousarray(windows[np.arange(b), :, rows, columns])


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
    channels = (1, -1, *(1,) * (images.dim() - 2))
    unit = 255.0 if images.dtype == torch.uint8 else 1.0
    scale = (1.0 / (std.double() * unit)).float().view(channels)
    shift = (-mean.double() / std.double()).float().view(channels)
    values = images.to(torch.float32, copy=True).mul_(scale).add_(shift)
    # Last, because arithmetic over three interleaved channels is ten times slower.
    return values.contiguous(memory_format=torch.channels_last) if channels_last else values
