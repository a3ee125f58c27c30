"""A state that continues from a checkpoint: read into its own memory, or refused before that."""

import numpy as np
import pytest
import torch
from torch import nn

from hpc_absa.checkpoint import CheckpointManager, restore
from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import UsageError
from hpc_absa.progress import Position, Progress
from hpc_absa.records import ScheduleState
from hpc_absa.training.state import TrainState
from tests.checkpoint.contents import flip_bit, snapshot

SERIAL = SerialCommunicator()


def new_state(dtype=torch.float32, steps=0, layout=torch.contiguous_format, optimizer="SGD"):
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))
    model.to(dtype, memory_format=layout)
    options = {"momentum": 0.9} if optimizer == "SGD" else {}
    made = getattr(torch.optim, optimizer)(model.parameters(), lr=0.1, **options)
    for _ in range(steps):
        made.zero_grad()
        model(torch.randn(2, 3, 4, 4, dtype=dtype)).square().sum().backward()
        made.step()
    vector = torch.full((7,), float(steps)) if steps else None
    progress = Progress(Position(step=steps), ScheduleState(32, 0.1))
    return TrainState(model, made, progress, vector)


def publish(state, manager):
    step = state.progress.position.step
    content = state.scalars(0, "sha256:0", "", world_size=1, global_batch=32, samples=0)
    path = manager.folder / f"step-{step:010d}-phase-001.h5"
    manager.publish(path, content.with_arrays(snapshot(state.tensors())))
    return path


def continue_from(manager, state):
    """The number of tensors whose memory was read into."""
    memory = {}

    def accept(header):
        memory.update(state.memory(header.places))
        return memory

    found = restore.newest_good(manager, SERIAL, accept)
    state.restore(found.content, found.path.name, memory)
    return len(memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
@pytest.mark.parametrize("steps", [0, 1])
def test_tensors_are_read_into_and_become_the_saved_ones(tmp_path, dtype, layout, optimizer, steps):
    manager = CheckpointManager(tmp_path, 2)
    saved = new_state(dtype, 3, layout, optimizer)
    publish(saved, manager)
    after = new_state(dtype, steps, layout, optimizer)
    before = {key: tensor.data_ptr() for key, tensor in after.tensors().items()}
    count = continue_from(manager, after)
    expected, actual = saved.tensors(), after.tensors()
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key
        assert (actual[key].dtype, actual[key].stride()) == (tensor.dtype, tensor.stride()), key
    contiguous = [key for key, tensor in expected.items() if tensor.is_contiguous()]
    assert count >= len(contiguous) - 1 - 6 * (optimizer == "Adam"), "not the JSON and the steps"
    same = [key for key in contiguous if before.get(key) == actual[key].data_ptr()]
    assert len(same) >= sum(key[0] == "model" for key in contiguous)


def test_the_restored_state_shares_no_memory_with_another(tmp_path):
    manager = CheckpointManager(tmp_path, 2)
    publish(new_state(steps=2), manager)
    one, other = new_state(), new_state()
    for state in (one, other):
        continue_from(manager, state)
    for tensor in one.tensors().values():
        tensor.zero_()
    assert all(t.abs().sum() > 0 for t in other.tensors().values() if t.is_floating_point())


def test_after_a_damaged_checkpoint_the_older_one_is_complete(tmp_path):
    manager = CheckpointManager(tmp_path, 2)
    saved = new_state(steps=1)
    publish(saved, manager)
    path = publish(new_state(steps=2), manager)
    flip_bit(path, path.stat().st_size - 2000)
    after = new_state()
    continue_from(manager, after)
    assert after.progress.position.step == 1
    expected = saved.tensors()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in after.tensors().items())


def test_a_refused_checkpoint_is_not_taken_for_a_damaged_one(tmp_path):
    manager = CheckpointManager(tmp_path, 2)
    for steps in (1, 2):
        publish(new_state(steps=steps), manager)
    seen = []

    def refuse(header):
        seen.append(header.path.name)
        assert header.places["model", "3.weight"].shape == (5, 16)
        assert np.dtype(header.places["model", "3.weight"].dtype) == np.float32
        raise UsageError(f"{header.path}: of another job")

    with pytest.raises(restore.RefusedError, match="of another job") as refused:
        restore.newest_good(manager, SERIAL, refuse)
    assert refused.value.status == UsageError.status
    assert seen == ["step-0000000002-phase-001.h5"]
