"""Images that a packed file holds as they were encoded (JPEG, PNG, ...), decoded as they are used.

`EncodedImages` takes the place of the array of pixels in a `Split`: indexed, it gives centre crops
as uint8 [b, 3, S, S]; `random_crops` gives augmented ones. Images are decoded by a pool of threads,
which need the interpreter's lock for a small part of the time.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

try:
    import simplejpeg
except ImportError:  # no wheel for this machine; Pillow is slower
    simplejpeg = None

from hpc_absa.data.resized_crop import center_box, random_boxes, resized
from hpc_absa.errors import HpcAbsaError, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

Store = Callable[[NDArray[Any], NDArray[np.uint8]], None]
"""Of a result [3, S, S] and the pixels [3, S, S] to be stored there."""

REDUCTIONS = (8, 4, 2)
"""Fractions of its size at which libjpeg can decode an image."""

Reduction = int | Callable[[int, int], int]

_EXIF_ORIENTATION = 0x0112


def decode(
    file: Path | Any, title: str, reduction: Reduction = 1, remarks: list[str] | None = None
) -> PILImage:
    """An image in RGB: what Pillow's `convert("RGB")` gives.

    Args:
        file: A path, or the bytes of a file, in any format that Pillow reads.
        title: Names the image in errors.
        reduction: A JPEG is decoded at 1/1, 1/2, 1/4 or 1/8 of its size, rounded up; a number, or
            a function of width and height.
        remarks: Is extended by what the conversion left out.

    Raises:
        UsageError: More than 8 bits per pixel in a mode that Pillow would clip.
        HpcAbsaError: Not an image, or truncated.
    """
    from PIL import Image

    try:
        with Image.open(file if isinstance(file, Path) else io.BytesIO(file)) as opened:
            mode = opened.mode
            if mode in ("I", "F") or mode.startswith("I;16"):
                raise UsageError(
                    f"{title}: pixels of {32 if mode in ('I', 'F') else 16} bits (Pillow's mode "
                    f"{mode}) would be clipped to white; convert the images to 8 bits, or read "
                    "them by a function (docs/data.md)"
                )
            if callable(reduction):
                reduction = reduction(*opened.size)
            if reduction > 1:
                opened.draft("RGB", (opened.width // reduction, opened.height // reduction))
            opened.load()
            image = opened if opened.mode == "RGB" else opened.convert("RGB")
            if remarks is not None:
                remarks += _left_out(opened)
            return image
    except UsageError:
        raise
    except Exception as error:  # damaged files give errors of many types
        raise HpcAbsaError(f"{title}: unreadable image ({error})") from error


def _left_out(image: Any) -> list[str]:
    """What `convert("RGB")` left out of an image that is still open."""
    remarks = []
    if image.has_transparency_data:
        remarks.append("images with transparency, which was dropped")
    if image.mode == "CMYK" and "icc_profile" in image.info:
        remarks.append("CMYK images, converted without their colour profile")
    with suppress(Exception):  # damaged metadata, or a damaged second frame
        if image.getexif().get(_EXIF_ORIENTATION, 1) != 1:
            remarks.append("images with an EXIF orientation, which was not applied")
        if getattr(image, "is_animated", False):
            remarks.append("images of several frames, the first one used")
    return remarks


def pixels_of(data: Any, title: str, reduction: int = 1) -> NDArray[np.uint8]:
    """As `decode`, the same pixels [H, W, 3], in two thirds of the time for a JPEG."""
    if simplejpeg is not None and bytes(data[:2]) == b"\xff\xd8":
        # An error or CMYK, of which Pillow decides what it becomes.
        with suppress(ValueError):
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            if space in ("YCbCr", "Gray", "RGB"):
                pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
                    data,
                    "RGB",
                    min_height=-(-height // reduction),
                    min_width=-(-width // reduction),
                )
                return pixels
    return np.array(decode(data, title, reduction))  # torch needs an array of its own


class EncodedImages:
    """Encoded images [N, 3, S, S] of a packed file; reads and decodes on access."""

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        data: NDArray[np.uint8],
        starts: NDArray[np.int64],
        lengths: NDArray[np.int64],
        sizes: NDArray[np.int64],
        image_size: int,
        path: Path,
        chosen: NDArray[np.int64] | None = None,
    ) -> None:
        """
        Args:
            data: All encoded images, one after the other; mapped from the file.
            starts: [N], of each image in `data`.
            lengths: [N], bytes.
            sizes: [N, 2], width and height in pixels.
            image_size: S, side of the crops.
            path: Of the file, for errors.
            chosen: The images of a part of the data set.
        """
        self._data, self._starts, self._lengths, self._sizes = data, starts, lengths, sizes
        self.image_size, self._path, self._chosen = image_size, path, chosen

    @property
    def shape(self) -> tuple[int, int, int, int]:
        count = len(self._starts) if self._chosen is None else len(self._chosen)
        return count, 3, self.image_size, self.image_size

    def __len__(self) -> int:
        return self.shape[0]

    def part(self, chosen: NDArray[np.int64]) -> EncodedImages:
        """These images only."""
        if self._chosen is not None:
            chosen = self._chosen[chosen]
        return EncodedImages(
            self._data, self._starts, self._lengths, self._sizes, self.image_size, self._path,
            chosen,
        )  # fmt: skip

    def __getitem__(self, samples: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Centre crops, [b, 3, S, S]."""
        return self.center_crops(samples)

    def center_crops(
        self,
        samples: NDArray[np.int64],
        result: NDArray[Any] | None = None,
        store: Store = np.copyto,
    ) -> NDArray[Any]:
        """Centre crops, [b, 3, S, S]; see `random_crops`."""
        indices = self._indices(samples)
        return self._map(lambda k: self._center(indices[k]), len(indices), result, store)

    def random_crops(
        self,
        samples: NDArray[np.int64],
        seed: int,
        epochs: NDArray[np.int64],
        flip: bool,
        result: NDArray[Any] | None = None,
        store: Store = np.copyto,
    ) -> NDArray[Any]:
        """Random resized crops, half of them mirrored with `flip`, [b, 3, S, S].

        What happens to an image does not depend on the other images of its batch.

        Args:
            samples: [b], indices.
            seed: The job's.
            epochs: [b], of each sample.
            flip: Whether to mirror.
            result: [b, 3, S, S], is filled and returned; by default a new array of uint8.
            store: Called in the thread that decoded an image as `store(result[k], pixels)`.
        """
        indices = self._indices(samples)
        widths, heights = self._sizes[indices].T
        boxes, mirrored = random_boxes(seed, epochs, np.asarray(samples), widths, heights)
        return self._map(
            lambda k: self._crop(indices[k], boxes[k], bool(flip and mirrored[k])),
            len(indices),
            result,
            store,
        )

    def _indices(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        samples = np.asarray(samples)
        return samples if self._chosen is None else self._chosen[samples]

    def _map(
        self,
        image: Callable[[int], NDArray[np.uint8]],
        count: int,
        result: NDArray[Any] | None,
        store: Store,
    ) -> NDArray[Any]:
        if result is None:
            result = np.empty((count, *self.shape[1:]), np.uint8)
        filled = result
        several = max(1, count // (2 * cores()))  # a task takes 50 µs besides its images

        def fill(first: int) -> None:
            for k in range(first, min(first + several, count)):
                store(filled[k], image(k).transpose(2, 0, 1))

        list(self._pool.map(fill, range(0, count, several)))
        return filled

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(cores(), thread_name_prefix="decode")

    def _open(self, index: int, reduction: int) -> NDArray[np.uint8]:
        start = int(self._starts[index])
        data = self._data[start : start + int(self._lengths[index])]
        return pixels_of(data, f"{self._path}: image {index}", reduction)

    def _center(self, index: int) -> NDArray[np.uint8]:
        width, height = (int(n) for n in self._sizes[index])
        size = resized(width, height, self.image_size)
        pixels = resize(self._open(index, reduction_of(width, height, size)), size)
        left, top, right, bottom = center_box(*size, self.image_size)
        return pixels[top:bottom, left:right]

    def _crop(self, index: int, box: NDArray[np.int64], mirrored: bool) -> NDArray[np.uint8]:
        left, top, width, height = box.tolist()
        whole_width, whole_height = self._sizes[index].tolist()
        size = self.image_size, self.image_size
        pixels = self._open(index, reduction_of(width, height, size))
        if pixels.shape[:2] == (whole_height, whole_width):
            # cropped first, so that no pixel outside of the box has an influence
            pixels = resize(pixels[top : top + height, left : left + width], size)
        else:
            from PIL import Image

            x, y = pixels.shape[1] / whole_width, pixels.shape[0] / whole_height
            edges = left * x, top * y, (left + width) * x, (top + height) * y
            reduced = Image.fromarray(pixels)  # torch knows no fractions of pixels
            pixels = np.asarray(reduced.resize(size, Image.Resampling.BILINEAR, box=edges))
        return pixels[:, ::-1] if mirrored else pixels


def cores() -> int:
    """Those that this process may use now; a forked rank is bound to its own after the imports."""
    return len(os.sched_getaffinity(0))


def resize(pixels: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """[H, W, 3] to (width, height): bilinear with antialias, as torchvision resizes tensors.

    Each of the two passes is rounded to whole numbers, as Pillow does, which takes four times as
    long; it runs in the calling thread alone.
    """
    import torch

    image = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)  # channels_last
    image = torch.nn.functional.interpolate(image, size[::-1], mode="bilinear", antialias=True)
    result: NDArray[np.uint8] = image[0].permute(1, 2, 0).numpy()
    return result


def reduction_of(width: int, height: int, size: tuple[int, int]) -> int:
    """The largest at which a crop is not smaller than its final size."""
    return next((n for n in REDUCTIONS if width >= n * size[0] and height >= n * size[1]), 1)
