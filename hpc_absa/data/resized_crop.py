"""Random resized crops and centre crops as torchvision computes them, for (seed, epoch, sample).

The distribution is that of torchvision's `RandomResizedCrop` (Szegedy et al., arXiv:1409.4842):
area uniform in `SCALE`, logarithm of the ratio uniform in `RATIO`, position uniform, ten tries, and
else the largest centred crop within `RATIO`. The random numbers depend on nothing but the seed, the
epoch and the sample's index.

Shapes: b images.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hpc_absa.data.order import uniform

SCALE = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10
RESIZE = 256 / 224
"""Shorter side before the centre crop of evaluation, relative to the crop (He et al. 2016)."""

_FLIP, _FIRST = 3, 16  # streams of random numbers; `augment` has 0 to 2

Ints = NDArray[np.int64]


def random_boxes(
    seed: int, epochs: Ints, samples: Ints, widths: Ints, heights: Ints
) -> tuple[Ints, NDArray[np.bool_]]:
    """Boxes (left, top, width, height) [b, 4] in pixels, and which images are mirrored [b].

    Args:
        seed: The job's.
        epochs: [b], the epoch that each image belongs to.
        samples: [b], each image's index in the training set.
        widths: [b], of the images, pixels.
        heights: [b], likewise.
    """
    streams = range(_FIRST, _FIRST + 4 * TRIES)
    numbers = uniform(seed, epochs, samples, streams).reshape(TRIES, 4, -1)
    area, ratio, left, top = numbers.swapaxes(0, 1)
    target = widths * heights * (SCALE[0] + (SCALE[1] - SCALE[0]) * area)
    low, high = np.log(RATIO)
    aspect = np.exp(low + (high - low) * ratio)
    width = np.rint(np.sqrt(target * aspect)).astype(np.int64)
    height = np.rint(np.sqrt(target / aspect)).astype(np.int64)
    fits = (width > 0) & (width <= widths) & (height > 0) & (height <= heights)
    x = np.floor(left * (widths - width + 1)).astype(np.int64)
    y = np.floor(top * (heights - height + 1)).astype(np.int64)
    tries = np.stack([x, y, width, height], axis=2)
    chosen = tries[fits.argmax(0), np.arange(len(samples))]  # the first that fits
    boxes = np.where(fits.any(0)[:, None], chosen, _fallback(widths, heights))
    return boxes, uniform(seed, epochs, samples, _FLIP) < 0.5


def _fallback(widths: Ints, heights: Ints) -> Ints:
    """The largest centred boxes whose ratio is within `RATIO`, [b, 4]."""
    ratio = widths / heights
    width = np.where(ratio > RATIO[1], np.rint(heights * RATIO[1]), widths).astype(np.int64)
    height = np.where(ratio < RATIO[0], np.rint(widths / RATIO[0]), heights).astype(np.int64)
    return np.stack([(widths - width) // 2, (heights - height) // 2, width, height], axis=1)


def resized(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height after the shorter side was resized for a centre crop to `size`."""
    short = round(size * RESIZE)
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def center_box(width: int, height: int, size: int) -> tuple[int, int, int, int]:
    """The (left, top, right, bottom) of a centre crop to `size`."""
    left, top = round((width - size) / 2.0), round((height - size) / 2.0)
    return left, top, left + size, top + size
