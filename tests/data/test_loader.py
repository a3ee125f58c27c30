import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_absa.data.arrays import PackedReader
from hpc_absa.data.augment import augment
from hpc_absa.data.loader import Loader
from hpc_absa.data.order import permutation
from hpc_absa.data.packing import write_packed
from hpc_absa.data.sources import Source
from hpc_absa.progress import SampleStream

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
    return write_packed(tmp_path_factory.mktemp("loader") / "set.h5", source, "some")


def loader(dataset, b=10, drop_last=False, seed=3, padding=2, flip=True, **more):
    count = len(dataset.train)
    stream = SampleStream(count, b, epochs=9, every=count, drop_last=drop_last)
    reader = PackedReader(dataset, seed, padding=padding, flip=flip, device=CPU, **more)
    return Loader(dataset, reader, stream, seed)


@settings(max_examples=20)
@given(b=st.integers(1, N), epochs=st.integers(1, 4), ranks=st.integers(1, 4))
def test_every_sample_once_an_epoch_with_any_number_of_ranks(dataset, b, epochs, ranks):
    reading = loader(dataset, b)
    whole = epochs * N // b
    visits = []
    for rank in range(ranks):
        for k in range(rank, whole, ranks):
            batch = reading.get(k)
            visits += zip(batch.epochs.tolist(), batch.samples.tolist(), strict=True)
    stream = [(e, s) for e in range(epochs) for s in permutation(3, e, N).tolist()]
    assert sorted(visits) == sorted(stream[: whole * b])


def test_a_microbatch_that_straddles_an_epochs_end(dataset):
    batch = loader(dataset).get(5)
    assert batch.epochs.tolist() == [0] * 3 + [1] * 7
    expected = [*permutation(3, 0, N)[50:], *permutation(3, 1, N)[:7]]
    assert batch.samples.tolist() == expected


def test_drop_last_omits_the_remainder_of_each_epoch(dataset):
    batch = loader(dataset, drop_last=True).get(5)
    assert batch.epochs.tolist() == [1] * 10
    assert batch.samples.tolist() == permutation(3, 1, N)[:10].tolist()


def test_inputs_are_the_augmented_images_of_these_samples(dataset):
    batch = loader(dataset).get(5)
    images = dataset.train.images[batch.samples]
    pixels = torch.tensor(augment(images, 3, batch.epochs, batch.samples, 2, True)).double() / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (dataset.mean, dataset.std))
    torch.testing.assert_close(batch.inputs.double(), (pixels - mean) / std, rtol=0, atol=1e-5)
    assert batch.inputs.dtype == torch.float32
    assert batch.targets.tolist() == (batch.samples % 4).tolist()
    assert batch.targets.dtype == torch.int64


def test_a_sample_is_augmented_alike_in_any_microbatch(dataset):
    inputs = {}
    for b in (7, 10, 53):
        reading = loader(dataset, b)
        for k in range(2 * N // b):
            batch = reading.get(k)
            for e, s, x in zip(batch.epochs, batch.samples, batch.inputs, strict=True):
                assert torch.equal(inputs.setdefault((e, s), x), x)
    assert len(inputs) == 2 * N


def test_channels_last(dataset):
    plain, other = loader(dataset), loader(dataset, channels_last=True)
    one, two = plain.get(0).inputs, other.get(0).inputs
    assert torch.equal(one, two)
    assert two.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("batch", [1, 8, 31, 100])
def test_evaluation_counts_every_test_image_once(dataset, size, batch):
    reading = loader(dataset)
    parts = [list(reading.evaluation(rank, size, batch)) for rank in range(size)]
    whole = list(reading.evaluation(0, 1, batch))
    assert all(number == len(batch.targets) for batch, number in whole)
    # The same batches with any number of ranks, distributed as evenly as possible.
    together = [pair for turn in range(len(parts[0])) for p in parts for pair in p[turn : turn + 1]]
    assert len(together) == len(whole)
    for (one, _), (other, _) in zip(together, whole, strict=True):
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.targets, other.targets)
    assert sum(number for _, number in whole) == TEST
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_sample_is_not_augmented(dataset):
    indices = np.array([5, 0, 5])
    inputs, targets = loader(dataset).sample(indices)
    plain, _ = loader(dataset, padding=0, flip=False).sample(indices)
    assert torch.equal(inputs, plain)
    assert torch.equal(inputs[0], inputs[2])
    assert targets.tolist() == [1, 0, 1]


def test_pixel_range_is_the_tightest_around_all_inputs(tmp_path):
    images = np.zeros((4, 3, 2, 2), np.uint8)
    images[:, :, 0, 0] = 255
    images[1] = np.arange(12).reshape(3, 2, 2)
    source = Source.from_arrays(images, [0, 1, 0, 1], images, [0, 1, 0, 1])
    reading = loader(write_packed(tmp_path / "set.h5", source, "some"), b=2)
    inputs, _ = reading.sample(np.arange(4))
    low, high = reading.reader.input_range()
    scale = reading.reader.input_scale()
    assert low.shape == high.shape == scale.shape == (1, 3, 1, 1)
    # Exactly, so that clamping to the range changes no clean input.
    assert torch.equal(inputs.clamp(low, high), inputs)
    assert (inputs == low).any()
    assert (inputs == high).any()
    torch.testing.assert_close(high - low, scale)


def test_feature_vectors(tmp_path):
    features = np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32)
    source = Source.from_arrays(features, np.arange(12) % 2, features, np.arange(12) % 2)
    reading = loader(write_packed(tmp_path / "set.h5", source, "own"), b=4, channels_last=True)
    batch = reading.get(0)
    assert torch.equal(batch.inputs, torch.from_numpy(features[batch.samples]))
    low, high = reading.reader.input_range()
    assert low.shape == reading.reader.input_scale().shape == (1, 5)
    assert torch.isinf(low).all()
    assert torch.isinf(high).all()
    limited = loader(reading.dataset, b=4, input_range=(0.0, 2.0)).reader.input_range()
    assert [end.unique().tolist() for end in limited] == [[0.0], [2.0]]


def prepared(reading, k):
    """Wait until the background thread has prepared microbatch k."""
    pending, *_ = reading._pending[k]
    return pending.result(timeout=60)


def test_announced_and_other_microbatches_are_the_same(dataset):
    reading = loader(dataset)
    # Announced rightly, not at all, wrongly, twice, and after the end of the epoch.
    for k, then in [(0, [1]), (1, []), (2, [7, 8]), (3, [3]), (3, [15]), (15, []), (0, [])]:
        batch, expected = reading.get(k, then), loader(dataset).get(k)
        assert batch.samples.tolist() == expected.samples.tolist()
        assert torch.equal(batch.inputs, expected.inputs)
    reading.close()


def test_an_announced_microbatch_is_prepared_in_a_background_thread(dataset, monkeypatch):
    threads = []

    def recorded(*arguments):
        threads.append(threading.current_thread().name)
        return augment(*arguments)

    monkeypatch.setattr("hpc_absa.data.arrays.augment", recorded)
    reading = loader(dataset)
    reading.get(0, then=[1])
    ready = prepared(reading, 1)
    assert reading.get(1).inputs is ready.inputs
    assert sorted(threads) == sorted([threading.current_thread().name, "loader_0"])


class Broken(PackedReader):
    """Cannot read the microbatch with sample 29."""

    def read(self, part, samples, epochs=None):
        if 29 in samples:
            raise ValueError("no such sample")
        return super().read(part, samples, epochs)


class Slow(PackedReader):
    """Reads beside training only when it is released."""

    release = threading.Event()

    def read(self, part, samples, epochs=None):
        if threading.current_thread() is not threading.main_thread():
            self.release.wait(60)
        return super().read(part, samples, epochs)


def with_reader(kind, dataset):
    reader = kind(dataset, 0, padding=0, flip=False, device=CPU)
    return Loader(dataset, reader, SampleStream(N, 10, epochs=1, every=N), 0)


def test_an_error_is_raised_where_its_microbatch_is_asked_for(dataset):
    reading = with_reader(Broken, dataset)
    broken = permutation(0, 0, N).tolist().index(29) // 10
    others = [k for k in range(5) if k != broken]
    reading.get(others[0], then=[broken])
    reading.get(others[1], then=[broken])
    with pytest.raises(ValueError, match="no such sample"):
        reading.get(broken, then=[others[2]])
    assert len(reading.get(others[2]).samples) == 10


def test_close_does_not_wait_for_the_thread(dataset):
    reading = with_reader(Slow, dataset)
    reading.get(0, then=[1])
    begun = time.monotonic()
    reading.close()
    assert time.monotonic() - begun < 30
    Slow.release.set()


def test_orders_are_computed_once_an_epoch(dataset, monkeypatch):
    calls = []

    def counted(*arguments):
        calls.append(arguments)
        return permutation(*arguments)

    monkeypatch.setattr("hpc_absa.data.loader.permutation", counted)
    reading = loader(dataset)
    for k in range(16):
        reading.get(k)
    assert calls == [(3, epoch, N) for epoch in range(4)]
