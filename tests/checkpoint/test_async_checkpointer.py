"""Saving in the background: what is pending, what fails, and when it is on disk."""

import threading

import numpy as np
import pytest
import torch

from hpc_absa.checkpoint import CheckpointManager, Content, Group, file
from hpc_absa.checkpoint.async_checkpointer import (
    AsyncCheckpointer,
    HostCopies,
    require_durable,
)
from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import CheckpointError, CollectiveError
from tests.checkpoint.contents import assert_same, snapshot


def scalars(step):
    return Content({"step": step}, {"model": Group(), "optimizer": Group({"name": "sgd"})})


class Setup:
    """A checkpointer of a folder, tensors to save, and what its callbacks received."""

    def __init__(self, folder, *, background=True, on_error="stop"):
        self.folder, self.warnings, self.published = folder, [], []
        self.tensors = {("model", "w"): torch.arange(6.0), ("optimizer", "m"): torch.ones(2, 3)}
        self.checkpointer = AsyncCheckpointer(
            CheckpointManager(folder, 3),
            SerialCommunicator(),
            background=background,
            shard_bytes=1 << 20,
            on_error=on_error,
            warn=self.warnings.append,
        )

    def path(self, step):
        return self.folder / f"step-{step:010d}-phase-001.h5"

    def save(self, step, **options):
        self.checkpointer.save(
            self.path(step), scalars(step), self.tensors, self.published.append, **options
        )

    def steps(self):
        return [int(p.name.split("-")[1]) for p in sorted(self.folder.glob("step-*.h5"))]


@pytest.fixture(name="break_writes")
def _break_writes(monkeypatch):
    """Files whose writing fails, as on a full disk."""
    broken, write = set(), file.write

    def fail(path, *args, ready):
        if path in broken:
            raise CheckpointError(f"{path}: cannot be written: no space left on the device")
        return write(path, *args, ready)

    monkeypatch.setattr(file, "write", fail)
    return broken


@pytest.mark.parametrize("background", [True, False])
def test_the_state_at_the_time_of_the_call_is_saved(tmp_path, background):
    setup = Setup(tmp_path, background=background)
    setup.save(1)
    setup.tensors["model", "w"].add_(1)
    assert setup.checkpointer.settle()
    arrays = file.read(setup.path(1)).groups["model"].arrays
    np.testing.assert_array_equal(arrays["w"], np.arange(6, dtype=np.float32))
    setup.save(2)
    assert setup.checkpointer.settle()
    np.testing.assert_array_equal(
        file.read(setup.path(2)).groups["model"].arrays["w"], np.arange(1, 7, dtype=np.float32)
    )
    assert [p.path for p in setup.published] == [setup.path(1), setup.path(2)]


def test_training_continues_while_a_save_is_written(tmp_path, monkeypatch):
    gate, write = threading.Event(), file.write
    monkeypatch.setattr(file, "write", lambda *args, ready: gate.wait(10) and write(*args))
    setup = Setup(tmp_path)
    setup.save(1)
    assert setup.steps() == []
    assert setup.checkpointer.flags() == (True, False)
    gate.set()
    setup.checkpointer.settle()
    assert setup.steps() == [1]


def test_at_most_one_save_is_in_progress(tmp_path, monkeypatch):
    write, running, most = file.write, [], []

    def counted(*args, ready):
        running.append(1)
        most.append(len(running))
        written = write(*args, ready)
        running.pop()
        return written

    monkeypatch.setattr(file, "write", counted)
    setup = Setup(tmp_path)
    for step in (1, 2, 3):
        setup.save(step)
    setup.checkpointer.settle()
    assert most == [1, 1, 1]
    assert setup.steps() == [1, 2, 3]


def test_a_failed_save_stops_the_run_at_the_next_step(tmp_path, break_writes):
    setup = Setup(tmp_path)
    setup.save(1)
    setup.checkpointer.settle()
    break_writes.add(setup.path(2))
    setup.save(2)
    setup.checkpointer.wait()
    assert setup.checkpointer.flags() == (True, True)
    with pytest.raises(CollectiveError, match=r"rank 0 on .*step-0000000002.*no space left"):
        setup.checkpointer.update(1, 1)
    assert setup.steps() == [1]
    assert len(setup.published) == 1


def test_training_continues_after_a_failed_save_if_the_job_allows_it(tmp_path, break_writes):
    setup = Setup(tmp_path, on_error="continue")
    break_writes.add(setup.path(1))
    setup.save(1)
    assert not setup.checkpointer.settle()
    assert setup.checkpointer.settle(), "reported once"
    (warning,) = setup.warnings
    assert "no space left" in warning
    assert "training continues without the checkpoint step-0000000001-" in warning
    setup.save(2)
    assert setup.checkpointer.settle()
    assert setup.steps() == [2]


def test_a_state_that_must_be_on_disk_is_saved_with_a_second_attempt(tmp_path, break_writes):
    setup = Setup(tmp_path, on_error="continue")
    break_writes.add(setup.path(1))
    setup.save(1)
    require_durable(setup.checkpointer, lambda: (break_writes.clear(), setup.save(1)))
    assert setup.steps() == [1]
    break_writes.add(setup.path(2))
    setup.save(2)
    with pytest.raises(CollectiveError, match="could not be saved"):
        require_durable(setup.checkpointer, lambda: setup.save(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_copies_are_bit_for_bit_and_reuse_their_memory(dtype):
    copies = HostCopies()
    first = snapshot({("model", "w"): torch.arange(4).to(dtype)}, copies)["model", "w"]
    again = snapshot({("model", "w"): torch.arange(4, 8).to(dtype)}, copies)["model", "w"]
    assert np.shares_memory(first, again)
    bits = torch.from_numpy(again.copy())
    bits = bits.view(torch.bfloat16) if dtype == torch.bfloat16 else bits
    assert torch.equal(bits, torch.arange(4, 8).to(dtype))


def test_copies_follow_a_tensor_that_changes_its_shape():
    copies = HostCopies()
    snapshot({("model", "w"): torch.zeros(2)}, copies)
    assert snapshot({("model", "w"): torch.ones(3)}, copies)["model", "w"].tolist() == [1, 1, 1]


def test_the_file_contains_all_scalars_and_tensors(tmp_path):
    setup = Setup(tmp_path)
    setup.save(1)
    setup.checkpointer.settle()
    arrays = {key: tensor.numpy() for key, tensor in setup.tensors.items()}
    expected = Content(
        scalars(1).attributes,
        {
            "model": Group({}, {"w": arrays["model", "w"]}),
            "optimizer": Group({"name": "sgd"}, {"m": arrays["optimizer", "m"]}),
        },
    )
    assert_same(file.read(setup.path(1)), expected)
