"""A checkpoint of the previous version, with the names that it used, is restored."""

import torch
from torch import nn

from hpc_absa.checkpoint import CheckpointManager, Content, Group, SavedPhase, restore, saved_phase
from hpc_absa.comm import SerialCommunicator
from hpc_absa.progress import Position, Progress
from hpc_absa.records import ScheduleState
from hpc_absa.training.state import TrainState

SCHEDULE = ScheduleState(64, 0.2, reference=3.5, patience_count=2)
PROGRESS = Progress(
    Position(12, 9, 3), SCHEDULE, phase=2, epoch=1, epoch_loss=4.5, epoch_samples=96, eigenvalue=3.0
)


def new_state():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return TrainState(model, optimizer, Progress(Position(), ScheduleState(32, 0.1)))


def trained_state():
    state = new_state()
    state.model(torch.ones(1, 3)).sum().backward()
    state.optimizer.step()
    state.progress, state.eigenvector = PROGRESS, torch.arange(8.0)
    return state


def as_previous_version(content):
    """Without the attributes that are new: `patience_count`, `next_ranks` and `rank_limit`."""
    schedule = dict(content.groups["schedule"].attributes)
    assert schedule.pop("patience_count") == schedule["waited"]
    assert not content.attributes.keys() & {"next_ranks", "rank_limit"}
    return Content(content.attributes, {**content.groups, "schedule": Group(schedule)})


def test_a_checkpoint_of_the_previous_version_is_restored(tmp_path):
    before, after = trained_state(), new_state()
    scalars = before.scalars(0, "sha256:1", "", samples=288, world_size=2, global_batch=64)
    arrays = {key: tensor.detach().numpy() for key, tensor in before.tensors().items()}
    content = as_previous_version(scalars).with_arrays(arrays)
    manager = CheckpointManager(tmp_path, 2)
    manager.publish(tmp_path / "step-0000000009-phase-002.h5", content)

    restored = restore.newest_good(manager, SerialCommunicator())
    after.restore(restored.content, restored.path.name)
    assert after.progress == PROGRESS
    restored_tensors = after.tensors()
    assert restored_tensors.keys() == before.tensors().keys()
    assert all(torch.equal(restored_tensors[k], t) for k, t in before.tensors().items())
    assert saved_phase(tmp_path) == SavedPhase(9, 64, None, None)
