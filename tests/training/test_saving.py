"""Saving in the background: what is in flight, what fails, what is durable when."""

import threading

import numpy as np
import pytest
import torch

from hpc_absa.checkpoint import Content, Group, Store, file
from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import CheckpointError, CollectiveError
from hpc_absa.training.saving import HostCopies, Saver, require_durable
from tests.checkpoint.contents import assert_same

SCALARS = Content({"step": 3}, {"model": Group(), "optimizer": Group({"name": "sgd"})})


class Rig:
    """A saver over a folder, its tensors, and what it told."""

    def __init__(self, folder, *, background=True, on_error="stop"):
        self.folder, self.warnings, self.published = folder, [], []
        self.tensors = {("model", "w"): torch.arange(6.0), ("optimizer", "m"): torch.ones(2, 3)}
        self.saver = Saver(
            Store(folder, 3),
            SerialCommunicator(),
            background=background,
            shard_bytes=1 << 20,
            on_error=on_error,
            warn=self.warnings.append,
        )

    def path(self, step):
        return self.folder / f"step-{step:010d}-phase-001.h5"

    def save(self, step):
        self.saver.save(self.path(step), SCALARS, self.tensors, self.published.append)

    def steps(self):
        return [int(p.name.split("-")[1]) for p in sorted(self.folder.glob("step-*.h5"))]


@pytest.fixture(name="break_writes")
def _break_writes(monkeypatch):
    """Files whose writing fails, as on a full disk."""
    broken, write = set(), file.write

    def fail(path, *of):
        if path in broken:
            raise CheckpointError(f"{path}: cannot be written: no space left on the device")
        return write(path, *of)

    monkeypatch.setattr(file, "write", fail)
    return broken


@pytest.mark.parametrize("background", [True, False])
def test_what_is_saved_is_the_state_at_that_moment(tmp_path, background):
    rig = Rig(tmp_path, background=background)
    rig.save(1)
    rig.tensors["model", "w"].add_(1)
    assert rig.saver.settle()
    arrays = file.read(rig.path(1)).groups["model"].arrays
    np.testing.assert_array_equal(arrays["w"], np.arange(6, dtype=np.float32))
    rig.save(2)
    assert rig.saver.settle()
    np.testing.assert_array_equal(
        file.read(rig.path(2)).groups["model"].arrays["w"], np.arange(1, 7, dtype=np.float32)
    )
    assert [p.path for p in rig.published] == [rig.path(1), rig.path(2)]


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    gate, write = threading.Event(), file.write
    monkeypatch.setattr(file, "write", lambda *of: gate.wait(10) and write(*of))
    rig = Rig(tmp_path)
    rig.save(1)
    assert rig.steps() == []
    assert rig.saver.flags() == (True, False)
    gate.set()
    rig.saver.settle()
    assert rig.steps() == [1]


def test_at_most_one_save_is_in_flight(tmp_path, monkeypatch):
    write, running, most = file.write, [], []

    def watched(*of):
        running.append(1)
        most.append(len(running))
        written = write(*of)
        running.pop()
        return written

    monkeypatch.setattr(file, "write", watched)
    rig = Rig(tmp_path)
    for step in (1, 2, 3):
        rig.save(step)
    rig.saver.settle()
    assert most == [1, 1, 1]
    assert rig.steps() == [1, 2, 3]


def test_a_failed_save_shows_at_the_next_step_and_stops_the_run(tmp_path, break_writes):
    rig = Rig(tmp_path)
    rig.save(1)
    rig.saver.settle()
    break_writes.add(rig.path(2))
    rig.save(2)
    rig.saver._publishing._thread.join()
    assert rig.saver.flags() == (True, True)
    with pytest.raises(CollectiveError, match=r"rank 0 on .*step-0000000002.*no space left"):
        rig.saver.heard(1, 1)
    assert rig.steps() == [1]
    assert len(rig.published) == 1


def test_a_failed_save_costs_no_training_where_the_job_says_so(tmp_path, break_writes):
    rig = Rig(tmp_path, on_error="continue")
    break_writes.add(rig.path(1))
    rig.save(1)
    assert not rig.saver.settle()
    assert rig.saver.settle(), "told once"
    (warning,) = rig.warnings
    assert "no space left" in warning
    assert "training goes on" in warning
    rig.save(2)
    assert rig.saver.settle()
    assert rig.steps() == [2]


def test_where_the_state_must_be_on_disk_it_is_tried_once_more(tmp_path, break_writes):
    rig = Rig(tmp_path, on_error="continue")
    break_writes.add(rig.path(1))
    rig.save(1)
    require_durable(rig.saver, lambda: (break_writes.clear(), rig.save(1)))
    assert rig.steps() == [1]
    break_writes.add(rig.path(2))
    rig.save(2)
    with pytest.raises(CollectiveError, match="could not be saved"):
        require_durable(rig.saver, lambda: rig.save(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64, torch.bfloat16])
def test_copies_are_bit_for_bit_and_stay_where_they_are(dtype):
    copies = HostCopies()
    first = copies.take({("model", "w"): torch.arange(4).to(dtype)})["model", "w"]
    again = copies.take({("model", "w"): torch.arange(4, 8).to(dtype)})["model", "w"]
    assert np.shares_memory(first, again)
    bits = torch.from_numpy(again.copy())
    bits = bits.view(torch.bfloat16) if dtype == torch.bfloat16 else bits
    assert torch.equal(bits, torch.arange(4, 8).to(dtype))


def test_copies_follow_a_tensor_that_changes_its_shape():
    copies = HostCopies()
    copies.take({("model", "w"): torch.zeros(2)})
    assert copies.take({("model", "w"): torch.ones(3)})["model", "w"].tolist() == [1, 1, 1]


def test_everything_of_the_content_is_in_the_file(tmp_path):
    rig = Rig(tmp_path)
    rig.save(1)
    rig.saver.settle()
    arrays = {key: tensor.numpy() for key, tensor in rig.tensors.items()}
    wanted = Content(
        SCALARS.attributes,
        {
            "model": Group({}, {"w": arrays["model", "w"]}),
            "optimizer": Group({"name": "sgd"}, {"m": arrays["optimizer", "m"]}),
        },
    )
    assert_same(file.read(rig.path(1)), wanted)
