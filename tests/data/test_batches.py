import threading
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_absa.data.augment import augment
from hpc_absa.data.batches import Batches
from hpc_absa.data.content import Source
from hpc_absa.data.order import permutation
from hpc_absa.data.packing import write_packed
from hpc_absa.progress import Course

CPU = torch.device("cpu")
N, TEST = 53, 31


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    random = np.random.default_rng(0)
    source = Source.from_arrays(
        random.integers(0, 256, (N, 3, 8, 8), dtype=np.uint8),
        np.arange(N) % 4,
        random.integers(0, 256, (TEST, 3, 8, 8), dtype=np.uint8),
        np.arange(TEST) % 4,
    )
    return write_packed(tmp_path_factory.mktemp("batches") / "set.h5", source, "some")


def batches(dataset, b=10, drop_last=False, seed=3, padding=2, flip=True, **more):
    course = Course(len(dataset.train), b, epochs=9, every=len(dataset.train), drop_last=drop_last)
    return Batches(dataset, course, seed, padding=padding, flip=flip, device=CPU, **more)


@settings(max_examples=20)
@given(b=st.integers(1, N), epochs=st.integers(1, 4), ranks=st.integers(1, 4))
def test_every_sample_once_an_epoch_whichever_ranks_read(dataset, b, epochs, ranks):
    reading = batches(dataset, b)
    whole = epochs * N // b
    visits = []
    for rank in range(ranks):
        for k in range(rank, whole, ranks):
            batch = reading.microbatch(k)
            visits += zip(batch.epochs.tolist(), batch.samples.tolist(), strict=True)
    stream = [(e, s) for e in range(epochs) for s in permutation(3, e, N).tolist()]
    assert sorted(visits) == sorted(stream[: whole * b])


def test_a_microbatch_that_straddles_an_epochs_end(dataset):
    batch = batches(dataset).microbatch(5)
    assert batch.epochs.tolist() == [0] * 3 + [1] * 7
    expected = [*permutation(3, 0, N)[50:], *permutation(3, 1, N)[:7]]
    assert batch.samples.tolist() == expected


def test_drop_leaves_out_the_remainder_of_each_epoch(dataset):
    batch = batches(dataset, drop_last=True).microbatch(5)
    assert batch.epochs.tolist() == [1] * 10
    assert batch.samples.tolist() == permutation(3, 1, N)[:10].tolist()


def test_inputs_are_the_augmented_images_of_these_samples(dataset):
    batch = batches(dataset).microbatch(5)
    images = torch.from_numpy(dataset.train.images[batch.samples])
    pixels = augment(images, 3, batch.epochs, batch.samples, 2, True).double() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (dataset.mean, dataset.std))
    torch.testing.assert_close(batch.inputs.double(), (pixels - mean) / std, rtol=0, atol=1e-5)
    assert batch.inputs.dtype == torch.float32
    assert batch.targets.tolist() == (batch.samples % 4).tolist()
    assert batch.targets.dtype == torch.int64


def test_a_visit_looks_the_same_in_any_microbatch(dataset):
    inputs = {}
    for b in (7, 10, 53):
        reading = batches(dataset, b)
        for k in range(2 * N // b):
            batch = reading.microbatch(k)
            for e, s, x in zip(batch.epochs, batch.samples, batch.inputs, strict=True):
                assert torch.equal(inputs.setdefault((e, s), x), x)
    assert len(inputs) == 2 * N


def test_channels_last(dataset):
    plain, other = batches(dataset), batches(dataset, channels_last=True)
    one, two = plain.microbatch(0).inputs, other.microbatch(0).inputs
    assert torch.equal(one, two)
    assert two.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 8, 31, 100])
def test_evaluation_counts_every_test_image_once(dataset, size, batch):
    reading = batches(dataset)
    parts = [list(reading.evaluation(rank, size, batch)) for rank in range(size)]
    whole = list(reading.evaluation(0, 1, batch))
    # The same batches, whatever the number of ranks, and dealt out as evenly as they can be.
    together = [pair for turn in range(len(parts[0])) for p in parts for pair in p[turn : turn + 1]]
    assert len(together) == len(whole)
    for one, other in zip(together, whole, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert sum(len(targets) for _, targets in whole) == TEST
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_sample_is_not_augmented(dataset):
    indices = np.array([5, 0, 5])
    inputs, targets = batches(dataset).sample(indices)
    plain, _ = batches(dataset, padding=0, flip=False).sample(indices)
    assert torch.equal(inputs, plain)
    assert torch.equal(inputs[0], inputs[2])
    assert targets.tolist() == [1, 0, 1]


def test_pixel_range_encloses_every_input_and_is_met(tmp_path):
    images = np.zeros((4, 3, 2, 2), np.uint8)
    images[:, :, 0, 0] = 255
    images[1] = np.arange(12).reshape(3, 2, 2)
    source = Source.from_arrays(images, [0, 1, 0, 1], images, [0, 1, 0, 1])
    reading = batches(write_packed(tmp_path / "set.h5", source, "some"), b=2)
    inputs, _ = reading.sample(np.arange(4))
    low, high = reading.pixel_range
    assert low.shape == high.shape == reading.pixel_scale.shape == (1, 3, 1, 1)
    # Exactly, so that clamping to the range changes no clean input.
    assert torch.equal(inputs.clamp(low, high), inputs)
    assert (inputs == low).any()
    assert (inputs == high).any()
    torch.testing.assert_close(high - low, reading.pixel_scale)


def test_feature_vectors(tmp_path):
    features = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    source = Source.from_arrays(features, np.arange(12) % 2, features, np.arange(12) % 2)
    reading = batches(write_packed(tmp_path / "set.h5", source, "own"), b=4, channels_last=True)
    batch = reading.microbatch(0)
    assert torch.equal(batch.inputs, torch.from_numpy(features[batch.samples]))
    low, high = reading.pixel_range
    assert low.shape == reading.pixel_scale.shape == (1, 5)
    assert torch.isinf(low).all()
    assert torch.isinf(high).all()


def test_prefetch_gives_the_same_microbatches_in_order(dataset):
    reading = batches(dataset)
    ks = [0, 1, 2, 7, 5]
    for k, batch in zip(ks, reading.prefetch(ks), strict=True):
        expected = batches(dataset).microbatch(k)
        assert batch.samples.tolist() == expected.samples.tolist()
        assert torch.equal(batch.inputs, expected.inputs)
    assert list(reading.prefetch([])) == []


def prefetching():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_prefetch_is_one_microbatch_ahead(dataset):
    asked = []
    reading = batches(dataset)

    def ks():
        for k in range(5):
            asked.append(k)
            yield k

    stream = reading.prefetch(ks())
    next(stream)
    assert asked == [0, 1]
    assert len(prefetching()) == 1
    stream.close()
    assert not prefetching()


@dataclass
class Broken:
    course: Course

    def segments(self, k):
        if k == 2:
            raise ValueError("no such microbatch")
        return self.course.segments(k)


def test_an_error_surfaces_where_its_microbatch_is_asked_for(dataset):
    course = Broken(Course(N, 10, epochs=1, every=N))
    reading = Batches(dataset, course, 0, padding=0, flip=False, device=CPU)
    stream = reading.prefetch(range(5))
    next(stream)
    next(stream)
    with pytest.raises(ValueError, match="no such microbatch"):
        next(stream)
    assert not prefetching()


def test_orders_are_not_computed_anew_for_each_microbatch(dataset, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return permutation(*arguments)

    monkeypatch.setattr("hpc_absa.data.batches.permutation", counted)
    reading = batches(dataset)
    for k in range(16):
        reading.microbatch(k)
    assert calls == [(3, epoch, N) for epoch in range(4)]
