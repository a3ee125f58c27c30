import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from hpc_absa.checkpoint import read, write
from hpc_absa.errors import CheckpointError
from hpc_absa.progress import Position
from hpc_absa.records import ScheduleState
from hpc_absa.schedules.noise import NoiseState
from hpc_absa.training.saving import HostCopies, _with_arrays
from hpc_absa.training.state import Live, Progress, described, restore, scalars, tensors

PROGRESS = Progress(
    Position(microbatch=12, step=5, boundary=2),
    ScheduleState(64, 0.1, 0.05, 3.25, 1, 0),
    phase=2,
    epoch=1,
    epoch_loss=1.5,
    epoch_samples=7,
    eigenvalue=2.5,
)


def live(width=4, steps=3, dtype=torch.float32):
    torch.manual_seed(steps)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, dtype=dtype)).square().mean().backward()
        optimizer.step()
    return Live(model, optimizer, torch.randn(5))


def saved(of, progress=PROGRESS):
    content = _with_arrays(
        scalars(progress, 3, "sha256:0", "name = 'x'"), HostCopies().take(tensors(of))
    )
    return described(content, world_size=2, global_batch=64, samples=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_state_comes_back_bit_for_bit_through_a_file(tmp_path, dtype):
    before = live(dtype=dtype)
    write(tmp_path / "a.h5", saved(before))
    after, progress = restore(read(tmp_path / "a.h5"), live(steps=0, dtype=dtype), "a.h5")
    assert progress == PROGRESS
    for name, tensor in before.model.state_dict().items():
        assert torch.equal(tensor, after.model.state_dict()[name]), name
    pairs = zip(before.model.parameters(), after.model.parameters(), strict=True)
    for p, q in pairs:
        ours, theirs = before.optimizer.state[p], after.optimizer.state[q]
        assert torch.equal(ours["momentum_buffer"], theirs["momentum_buffer"])
    assert torch.equal(before.eigenvector, after.eigenvector)


def test_training_goes_on_from_a_restored_state_as_if_nothing_had_been():
    unbroken = live()
    restored, _ = restore(saved(unbroken), live(steps=0), "x")
    for one in (unbroken, restored):
        torch.manual_seed(9)
        one.optimizer.zero_grad()
        one.model(torch.randn(8, 3)).square().mean().backward()
        one.optimizer.step()
    for p, q in zip(unbroken.model.parameters(), restored.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_snapshot_does_not_follow_the_training():
    of = live()
    content = saved(of)
    kept = copy.deepcopy(content.groups["model"].arrays)
    with torch.no_grad():
        for p in of.model.parameters():
            p.add_(1)
    for name, array in content.groups["model"].arrays.items():
        np.testing.assert_array_equal(array, kept[name])


def test_what_is_absent_stays_absent():
    fresh = Live(live(steps=0).model, live(steps=0).optimizer, None)
    begun = Progress(Position(), ScheduleState(32, 0.1))
    restored, progress = restore(saved(fresh, begun), live(steps=0), "x")
    assert progress == begun
    assert restored.eigenvector is None
    assert not restored.optimizer.state


def test_another_models_checkpoint_is_refused_by_name():
    with pytest.raises(CheckpointError, match=r"a\.h5: of another model: 0\.weight has shape"):
        restore(saved(live(width=5)), live(width=4), "a.h5")
    extra = live()
    extra.model.add_module("9", nn.Linear(2, 2))
    with pytest.raises(CheckpointError, match=r"9\.bias is only in the model"):
        restore(saved(live()), extra, "a.h5")


def test_a_schedule_s_own_memory_comes_back(tmp_path):
    of = live()
    state = NoiseState(64, 0.1, noise=3.5, signal=0.25, steps=7)
    write(tmp_path / "a.h5", saved(of, replace(PROGRESS, schedule=state)))
    content = read(tmp_path / "a.h5")
    assert restore(content, live(), "a.h5", NoiseState)[1].schedule == state
    # A run that insists on another method leaves what that one does not know.
    assert restore(content, live(), "a.h5")[1].schedule == ScheduleState(64, 0.1)
