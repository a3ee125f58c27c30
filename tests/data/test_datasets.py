"""torch data sets of any kind: the same batches with workers, seeded samples, digests, refusals."""

import os
import random
from multiprocessing import forkserver

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves

from hpc_absa.data import sources
from hpc_absa.data.datasets import Datasets, MapDataset, MapReader, as_datasets, collated
from hpc_absa.data.loader import Loader
from hpc_absa.data.workers import SIGNALS
from hpc_absa.errors import UsageError
from hpc_absa.progress import SampleStream
from tests.data import kinds

CPU = torch.device("cpu")
KINDS = "tests.data.kinds"


def opened(name):
    datasets = sources.load(f"{KINDS}:{name}", None, {})
    return MapDataset(f"{KINDS}:{name}", datasets)


def loader(name, b=7, workers=0, seed=3):
    dataset = opened(name)
    reader = MapReader(dataset, seed, workers=workers, device=CPU)
    count = len(dataset.train)
    return Loader(dataset, reader, SampleStream(count, b, epochs=3, every=count), seed)


def bits(batch):
    return [
        leaf.numpy().tobytes() if isinstance(leaf, torch.Tensor) else leaf
        for leaf in tree_leaves((batch.inputs, batch.targets))
    ]


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.fixture(scope="module")
def with_workers():
    readings = {name: loader(name, workers=2) for name in ("augmented", "text", "lists")}
    yield readings
    for reading in readings.values():
        reading.close()


@pytest.mark.parametrize("name", ["augmented", "text", "lists"])
def test_workers_read_the_same_bits_in_the_same_order(with_workers, name):
    alone, helped = loader(name), with_workers[name]
    assert (alone.ahead, helped.ahead) == (0, 4)
    for k in range(12):
        before = states()
        expected = alone.get(k)
        assert states() == before
        batch = helped.get(k, then=range(k + 1, k + 6) if k % 3 else [])
        assert batch.samples.tolist() == expected.samples.tolist()
        assert bits(batch) == bits(expected)
    whole = [bits(batch) for batch, _ in alone.evaluation(0, 1, 4)]
    assert [bits(batch) for batch, _ in helped.evaluation(0, 1, 4)] == whole
    assert sum(number for _, number in alone.evaluation(0, 1, 4)) == len(alone.dataset.test)


def test_a_sample_is_random_by_seed_epoch_and_index_alone():
    seen = {}
    for b in (5, 7, 41):
        reading = loader("augmented", b)
        for k in range(2 * kinds.SAMPLES // b):
            batch = reading.get(k)
            for key in zip(batch.epochs, batch.samples, batch.inputs, strict=True):
                epoch, index, inputs = key
                assert torch.equal(seen.setdefault((epoch, index), inputs), inputs)
                assert inputs[4] == index
    assert len(seen) == 2 * kinds.SAMPLES
    values = {tuple(x.tolist()) for x in seen.values()}
    assert len(values) == len(seen)
    other = loader("augmented", 41, seed=4).get(0)
    same = loader("augmented", 41, seed=3).get(0)
    assert not set(map(tuple, other.inputs.tolist())) & set(map(tuple, same.inputs.tolist()))


def test_what_a_batch_is_made_of():
    inputs, targets = loader("text").sample(np.arange(3))
    assert inputs["ids"].dtype == targets.dtype == torch.int64
    assert inputs["names"] == ["line 0", "line 1", "line 2"]
    assert (targets == -100).any()
    pair, nothing = loader("pairs").sample(np.array([20, 40]))
    assert pair.kwargs["b"].tolist() == [0.5, 1.0]
    assert nothing is None
    inputs, targets = loader("regression").sample(np.arange(2))
    assert (inputs.shape, targets.dtype) == ((2, 5), torch.int64)
    assert loader("augmented").reader.input_range()[1] == 1.0


def test_rows_of_tensors_are_what_the_default_collate_function_makes():
    random_numbers = torch.Generator().manual_seed(0)
    tensors = torch.randn(9, 2, generator=random_numbers), torch.arange(9), torch.arange(9) > 3
    dataset, rows = torch.utils.data.TensorDataset(*tensors), np.array([5, 0, 5])
    for whole in (False, True):
        datasets = Datasets(dataset, whole=whole)
        batch = collated(datasets, "train", rows, 0)
        expected = torch.utils.data.default_collate([dataset[row] for row in rows])
        assert type(batch.inputs) is type(expected)
        for ours, theirs in zip(batch.inputs, expected, strict=True):
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype


def test_what_a_model_is_offered():
    assert opened("regression").offered == {"channels": 5}
    assert opened("text").offered == {"classes": kinds.VOCABULARY}


def test_the_digest_covers_lengths_and_some_samples():
    digests = {name: opened(name).digest for name in ("text", "regression", "multi_label")}
    assert digests["text"] == opened("text").digest
    train, test = kinds.regression()
    digests["shorter"] = MapDataset("x", as_datasets((train, kinds.multi_label()[1]))).digest
    train.tensors[0][0, 0] += 1
    digests["changed"] = MapDataset("x", as_datasets((train, test))).digest
    digests["without test"] = MapDataset("x", as_datasets(test)).digest
    assert len(set(digests.values())) == len(digests)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("stream", "the train set is a Stream, expected a map-style data set with __getitem__"),
        ("unseeded", "its samples differ when they are read again; expected randomness from the"),
        ("ragged", "reading and collating samples failed: RuntimeError: .*need a collate_fn"),
        ("nothing", "returned list, expected a Source .* torch.utils.data.Dataset"),
    ],
)
def test_what_is_refused_is_one_line(name, message):
    with pytest.raises(UsageError, match=message) as error:
        opened(name)
    assert "\n" not in str(error.value)
    assert f"{KINDS}:{name}" in str(error.value)


def test_a_data_set_that_cannot_be_sent_to_workers():
    with pytest.raises(UsageError, match=r"closure': sending it to 1 worker.* or use no workers"):
        loader("closure", workers=1)


def test_an_error_in_a_worker_is_raised_where_its_batch_is_asked_for():
    reading = loader("breaks", workers=1)
    broken = next(k for k in range(6) if 7 in reading.samples(k)[0])
    reading.get(5 - broken, then=[broken])
    with pytest.raises(
        UsageError, match=r"sample \d+ of the train set failed: OSError: the disk is gone"
    ):
        reading.get(broken)
    reading.close()


def test_signals_that_stop_a_rank_do_not_end_its_workers():
    reader = loader("lists", workers=1).reader
    first = bits(reader.submit("train", np.arange(4)).result())
    (worker,) = reader._workers._pool._processes
    for process in (forkserver._forkserver._forkserver_pid, worker):
        for number in SIGNALS:
            os.kill(process, number)
    assert bits(reader.submit("train", np.arange(4)).result()) == first
    reader.close()
