"""A large state saved and restored by all ranks together: saving_program.py FOLDER."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_absa.checkpoint import CheckpointManager, Content, Group, file, restore
from hpc_absa.checkpoint.async_checkpointer import AsyncCheckpointer
from hpc_absa.comm import connect
from hpc_absa.errors import CheckpointError, CollectiveError
from tests.checkpoint.contents import flip_bit, shards_of


def scalars(step):
    return Content(
        {"step": step, "epoch": 0}, {"model": Group(), "curvature": Group({"eigenvalue": 2.5})}
    )


def state(step):
    """Five large tensors of different sizes and one small one."""
    generator = torch.Generator().manual_seed(step)
    sizes = (40_000, 30_000, 20_000, 20_000, 17_000, 10)
    return {
        ("curvature" if index == 3 else "model", f"w{index}"): torch.randn(n, generator=generator)
        for index, n in enumerate(sizes)
    }


def same(content, step):
    """Whether a restored content has the tensors of `state(step)`."""
    arrays = {key: torch.from_numpy(array.copy()) for key, array in content.arrays().items()}
    return arrays.keys() == state(step).keys() and all(
        torch.equal(arrays[key], tensor) for key, tensor in state(step).items()
    )


def main(folder):
    comm = connect()
    warnings, published = [], []
    checkpointer = AsyncCheckpointer(
        CheckpointManager(folder, 3),
        comm,
        background=True,
        shard_bytes=1 << 16,
        on_error="continue",
        warn=warnings.append,
    )

    def save(step):
        path = folder / f"step-{step:010d}-phase-001.h5"
        checkpointer.save(path, scalars(step), state(step), published.append)

    def take_steps_until_shards_are_written():
        """What the training loop does with every step's sums; rank 0 publishes at the end."""
        while not checkpointer._pending.complete:
            flags = torch.tensor(checkpointer.flags(), dtype=torch.float64)
            checkpointer.update(*map(round, comm.allreduce_(flags).tolist()))

    save(1)
    take_steps_until_shards_are_written()
    assert checkpointer.settle()
    save(2)
    assert checkpointer.settle(), "also without a step in between"
    assert not warnings
    if comm.rank == 0:
        assert [p.bytes for p in published] == [
            sum(f.stat().st_size for f in [p.path, *shards_of(p.path)]) for p in published
        ]
        assert len(shards_of(published[0].path)) == comm.size
        file.read(published[0].path)

    restored = restore.newest_good(CheckpointManager(folder, 3), comm)
    assert restored.path.name.startswith("step-0000000002")
    assert same(restored.content, 2)
    assert restored.content.groups["curvature"].attributes["eigenvalue"] == 2.5

    comm.allgather_object(None)
    if comm.rank == 0:
        flip_bit(shards_of(restored.path)[1], -5)
    comm.allgather_object(None)
    older = restore.newest_good(CheckpointManager(folder, 3), comm)
    assert older.path.name.startswith("step-0000000001")
    assert same(older.content, 1)
    assert ".shard: damaged: bytes" in older.damaged[0]

    if comm.rank == comm.size - 1:
        file.write, write = unwritable, file.write
    save(3)
    assert not checkpointer.settle()
    assert f"rank {comm.size - 1} on " in warnings[0]
    assert "no space left" in warnings[0]
    if comm.rank == comm.size - 1:
        file.write = write
    save(4)
    assert checkpointer.settle(), "a failed save does not affect the next one"
    assert same(restore.load(folder / "step-0000000004-phase-001.h5", comm), 4)
    with pytest.raises(CollectiveError, match="no such file"):
        restore.load(folder / "none.h5", comm)
    print(f"rank {comm.rank} of {comm.size} fine")
    comm.close()


def unwritable(path, *_, **__):
    raise CheckpointError(f"{path}: cannot be written: no space left on the device")


if __name__ == "__main__":
    np.seterr(all="raise")
    main(Path(sys.argv[1]))
