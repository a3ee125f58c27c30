"""The state of a run as a checkpoint's content, and back."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hpc_absa.checkpoint import Group, read, write
from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import CheckpointError, CollectiveError, ExitStatus
from hpc_absa.progress import Position, Progress
from hpc_absa.records import ScheduleState
from hpc_absa.schedules.noise import NoiseState
from hpc_absa.training.equal_ranks import digest, require_equal
from hpc_absa.training.state import TrainState, load_model
from tests.checkpoint.contents import snapshot

PROGRESS = Progress(
    Position(microbatch=12, step=5, boundary=2),
    ScheduleState(64, 0.1, 0.05, 3.25, 1, 0),
    phase=2,
    epoch=1,
    epoch_loss=1.5,
    epoch_samples=7,
    eigenvalue=2.5,
)
INITIAL = Progress(Position(), ScheduleState(32, 0.1))


def trained(width=4, steps=3, dtype=torch.float32):
    """A state after `steps` steps, from weights and data that depend on `steps`."""
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, dtype=dtype)).square().mean().backward()
        optimizer.step()
    return TrainState(model, optimizer, PROGRESS, torch.randn(5))


def untrained(schedule=INITIAL.schedule, **options):
    state = trained(steps=0, **options)
    state.progress, state.eigenvector = replace(INITIAL, schedule=schedule), None
    return state


def saved(state):
    scalars = state.scalars(3, "sha256:0", "name = 'x'", world_size=2, global_batch=64, samples=100)
    return scalars.with_arrays(snapshot(state.tensors()))


def restored(content, state):
    state.restore(content, "a.h5")
    return state


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_state_is_restored_bit_for_bit_from_a_file(tmp_path, dtype):
    before = trained(dtype=dtype)
    write(tmp_path / "a.h5", saved(before))
    after = restored(read(tmp_path / "a.h5"), untrained(dtype=dtype))
    assert after.progress == PROGRESS
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(tensor, after.model.state_dict()[name]), name
    pairs = zip(before.model.parameters(), after.model.parameters(), strict=True)
    for p, q in pairs:
        ours, theirs = before.optimizer.state[p], after.optimizer.state[q]
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])
    assert torch.equal(before.eigenvector, after.eigenvector)


@pytest.mark.parametrize("kind", ["AdamW", "Adam", "NAdam", "RMSprop", "Adagrad", "Adafactor"])
def test_the_state_of_any_torch_optimizer_is_restored_bit_for_bit(tmp_path, kind):
    def state(steps):
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        model.scale = nn.Parameter(torch.tensor(1.0))  # as scalar as a step counter
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.01)
        return take_steps(TrainState(model, optimizer, INITIAL), steps)

    def take_steps(state, steps):
        for _ in range(steps):
            state.optimizer.zero_grad()
            inputs = torch.linspace(-1, 1, 12).view(4, 3)
            (state.model(inputs) * state.model.scale).square().mean().backward()
            state.optimizer.step()
        return state

    uninterrupted = state(steps=3)
    write(tmp_path / "a.h5", saved(uninterrupted))
    resumed = restored(read(tmp_path / "a.h5"), state(steps=0))
    for p, q in zip(*(s.model.parameters() for s in (uninterrupted, resumed)), strict=True):
        ours, theirs = uninterrupted.optimizer.state[p], resumed.optimizer.state[q]
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), name
            assert value.dtype == theirs[name].dtype
    take_steps(uninterrupted, 2)
    take_steps(resumed, 2)
    for p, q in zip(*(s.model.parameters() for s in (uninterrupted, resumed)), strict=True):
        assert torch.equal(p, q)


def test_a_model_in_float32_gets_the_values_of_one_in_bfloat16():
    before, after = trained(dtype=torch.bfloat16), untrained()
    load_model(after.model, saved(before).groups["model"].arrays, "a.h5")
    for name, tensor in after.model.state_dict().items():
        assert torch.equal(tensor, before.model.state_dict()[name].to(tensor.dtype)), name


def test_training_continues_from_a_restored_state_as_without_an_interruption():
    uninterrupted = trained()
    resumed = restored(saved(uninterrupted), untrained())
    for state in (uninterrupted, resumed):
        torch.manual_seed(9)
        state.optimizer.zero_grad()
        state.model(torch.randn(8, 3)).square().mean().backward()
        state.optimizer.step()
    pairs = zip(uninterrupted.model.parameters(), resumed.model.parameters(), strict=True)
    for p, q in pairs:
        assert torch.equal(p, q)


def test_a_snapshot_does_not_change_with_the_training():
    state = trained()
    content = saved(state)
    before = copy.deepcopy(content.groups["model"].arrays)
    with torch.no_grad():
        for p in state.model.parameters():
            p.add_(1)
    for name, array in content.groups["model"].arrays.items():
        np.testing.assert_array_equal(array, before[name])


def test_values_that_are_absent_stay_absent():
    state = restored(saved(untrained()), untrained())
    assert state.progress == INITIAL
    assert state.eigenvector is None
    assert not state.optimizer.state


def test_a_checkpoint_of_another_model_is_refused_with_the_first_difference():
    with pytest.raises(CheckpointError, match=r"a\.h5: of another model: 0\.weight has shape"):
        restored(saved(trained(width=5)), trained(width=4))
    larger = trained()
    larger.model.add_module("9", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"9\.bias is only in the model"):
        restored(saved(trained()), larger)


def test_the_additional_state_of_a_schedule_is_restored(tmp_path):
    noise = NoiseState(64, 0.1, noise=3.5, signal=0.25, steps=7)
    state = trained()
    state.progress = replace(PROGRESS, schedule=noise)
    write(tmp_path / "a.h5", saved(state))
    content = read(tmp_path / "a.h5")
    assert restored(content, untrained(NoiseState(1, 1.0))).progress.schedule == noise
    # A run that changes the method drops what the new one does not have.
    assert restored(content, untrained()).progress.schedule == ScheduleState(64, 0.1)


def test_a_schedule_state_with_former_attribute_names_is_restored():
    content = saved(trained())
    attributes = dict(content.groups["schedule"].attributes)
    assert attributes.pop("patience_count") == attributes["waited"] == 1
    old = replace(content, groups={**content.groups, "schedule": Group(attributes)})
    assert restored(old, untrained()).progress == PROGRESS


# Comparison over ranks


class Rank(SerialCommunicator):
    """One of two ranks; gathers what both give."""

    size = 2

    def __init__(self, other):
        self.mine, self.other = [], iter(other)

    def allgather_object(self, value):
        self.mine.append(value)
        return [value, next(self.other, value)]


def compared(one, other):
    """The error on rank 0 if rank 1 has `other`."""
    probe = Rank([0, {}])
    with pytest.raises(CollectiveError):
        require_equal(other, probe)
    with pytest.raises(CollectiveError) as error:
        require_equal(one, Rank(probe.mine))
    return error.value


@pytest.mark.parametrize("key", [("model", "1.running_mean"), ("optimizer", "momentum.0.weight")])
def test_a_tensor_that_differs_between_ranks_is_named(key):
    one, other = trained().tensors(), trained().tensors()
    require_equal(one, Rank([]))
    with torch.no_grad():
        other[key].view(-1)[-1] += 1e-7
    error = compared(one, other)
    assert str(error).startswith(f"{key[0]}/{key[1]} differs between rank 0 and rank 1")
    assert error.status == ExitStatus.FAILED


def test_a_number_that_differs_is_named_by_its_state():
    def tensors(loss):
        state = trained()
        state.others = {"history": SimpleNamespace(state_dict=lambda: {"losses": [loss]})}
        return state.tensors()

    error = compared(tensors(0.5), tensors(0.25))
    assert str(error).startswith("state/history differs between rank 0 and rank 1")


def test_a_tensor_that_only_one_rank_has_is_named():
    one = trained().tensors()
    missing = {key: value for key, value in one.items() if key != ("model", "2.bias")}
    assert str(compared(one, missing)).startswith("model/2.bias differs")


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64],
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 4, 5), (30_000,)])
def test_the_digest_depends_on_each_element_and_not_on_the_memory_format(dtype, shape):
    torch.manual_seed(0)
    tensor = torch.randn(shape, dtype=torch.float32).to(dtype)
    same = tensor.clone()
    if len(shape) == 4:
        same = same.to(memory_format=torch.channels_last)
    assert digest(tensor) == digest(same)
    last = tuple(-1 for _ in shape)
    same[last] = ~same[last] if dtype == torch.bool else 7
    assert digest(tensor) != digest(same)


class WithExtraState(nn.Linear):
    calls = 0

    def get_extra_state(self):
        return torch.tensor(self.calls)

    def set_extra_state(self, state):
        self.calls = int(state)


def test_an_extra_state_that_is_a_tensor_is_restored():
    def state(calls):
        model = WithExtraState(2, 2)
        model.calls = calls
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return TrainState(model, optimizer, INITIAL)

    assert restored(saved(state(5)), state(0)).model.calls == 5
