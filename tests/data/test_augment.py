import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_absa.data.augment import (
    Buffers,
    augment,
    normalise,
    normalise_into,
    scale_and_shift,
)
from hpc_absa.data.order import uniform


def random_images(b, c=3, h=8, w=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (b, c, h, w), dtype=torch.uint8, generator=generator).numpy()


def reference(image, seed, epoch, sample, padding, flip):
    """One image, by a slow and simple implementation."""
    row, column, mirror = (
        float(uniform(seed, epoch, np.array([sample]), stream)[0]) for stream in range(3)
    )
    offsets = 2 * padding + 1
    c, h, w = image.shape
    padded = np.zeros((c, h + 2 * padding, w + 2 * padding), np.uint8)
    padded[:, padding : padding + h, padding : padding + w] = image
    top, left = int(row * offsets), int(column * offsets)
    cropped = padded[:, top : top + h, left : left + w]
    return cropped[..., ::-1] if flip and mirror < 0.5 else cropped


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**63),
    visits=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 999)), min_size=1, max_size=12),
    padding=st.integers(0, 5),
    flip=st.booleans(),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
)
def test_a_batch_is_augmented_as_each_image_alone(seed, visits, padding, flip, shape):
    epochs, samples = np.array(visits, dtype=np.int64).T
    images = random_images(len(visits), *shape)
    before = images.copy()
    result = augment(images, seed, epochs, samples, padding, flip)
    for i, (epoch, sample) in enumerate(visits):
        expected = reference(images[i], seed, epoch, sample, padding, flip)
        assert np.array_equal(result[i], expected)
    assert np.array_equal(images, before)


def test_every_offset_occurs_and_half_of_the_images_are_mirrored():
    b, padding = 2000, 2
    # One bright pixel in the middle shows the offset.
    images = np.zeros((b, 1, 7, 7), np.uint8)
    images[:, 0, 3, 3] = 255
    epochs, samples = np.zeros(b, np.int64), np.arange(b)
    moved = augment(images, 0, epochs, samples, padding, flip=False)
    places = np.bincount(moved.reshape(b, 49).argmax(1), minlength=49).reshape(7, 7)
    assert (places > 0).sum() == 25
    assert places[1:6, 1:6].min() > b / 25 / 2
    stripes = np.broadcast_to(np.arange(7, dtype=np.uint8), (b, 1, 7, 7))
    mirrored = augment(stripes, 0, epochs, samples, 0, flip=True)[:, 0, 0, 0] == 6
    assert 0.45 < mirrored.mean() < 0.55


def test_padding_is_black():
    white = np.full((200, 3, 4, 4), 255, np.uint8)
    result = augment(white, 0, np.zeros(200, np.int64), np.arange(200), 4, flip=False)
    assert set(np.unique(result)) == {0, 255}


def test_augmentation_differs_between_epochs():
    images = random_images(64)
    samples = np.arange(64)
    one, two = (augment(images, 0, np.full(64, e), samples, 2, True) for e in (0, 1))
    assert not np.array_equal(one, two)


def test_without_crop_and_flip_images_are_returned():
    images = random_images(4)
    assert augment(images, 0, np.zeros(4, np.int64), np.arange(4), 0, False) is images


def test_normalise():
    images = torch.tensor(random_images(5))
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 1.0])
    result = normalise(images, mean, std)
    expected = (images.double() / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape", [(13, 3, 5, 3), (5, 1, 300, 200), (3, 4, 1, 7)])
def test_normalisation_in_blocks_gives_the_same_bits(shape, channels_last, interleaved):
    """Whatever the place in the batch, and the layout in memory of images and result."""
    images = random_images(*shape)
    if interleaved:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    mean, std = torch.linspace(0.1, 0.4, shape[1]), torch.linspace(0.3, 0.9, shape[1])
    expected = normalise(torch.tensor(images), mean, std)
    result = Buffers().empty(shape, channels_last)
    normalise_into(result, images, *(values.numpy() for values in scale_and_shift(mean, std)))
    assert result.ctypes.data % 64 == 0
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert torch.from_numpy(result).is_contiguous(memory_format=layout)
    assert np.array_equal(result, expected)


def test_other_data_is_not_divided_by_255():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    result = normalise(values, torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]))
    assert result.tolist() == [[0.0, 0.0], [2.0, 1.0]]
    assert values.tolist() == [[1.0, 2.0], [3.0, 4.0]]
