"""A large state saved and restored by all ranks together: saving_program.py FOLDER."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_absa.checkpoint import Content, Group, Store, file, shards
from hpc_absa.comm import connect
from hpc_absa.errors import CheckpointError, CollectiveError
from hpc_absa.training import resuming
from hpc_absa.training.saving import Saver


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
    """Whether a restored content holds the tensors of `state(step)`."""
    arrays = {key: torch.from_numpy(array.copy()) for key, array in content.arrays().items()}
    return arrays.keys() == state(step).keys() and all(
        torch.equal(arrays[key], tensor) for key, tensor in state(step).items()
    )


def main(folder):
    comm = connect()
    warned, published = [], []
    saver = Saver(
        Store(folder, 3), comm, background=True, shard_bytes=1 << 16, on_error="continue",
        warn=warned.append,
    )  # fmt: skip

    def save(step):
        saver.save(
            folder / f"step-{step:010d}-phase-001.h5", scalars(step), state(step), published.append
        )

    def steps_until_durable():
        """What the loop does with every step's sums; rank 0 publishes when all have written."""
        told = None
        while told is None or not saver._flight.indexed:
            told = comm.allreduce_(torch.tensor(saver.flags(), dtype=torch.float64))
            saver.heard(*map(round, told.tolist()))

    save(1)
    steps_until_durable()
    assert saver.settle()
    save(2)
    assert saver.settle(), "also where no step comes in between"
    assert not warned
    if comm.rank == 0:
        assert [p.bytes for p in published] == [
            sum(f.stat().st_size for f in [p.path, *shards.of(p.path)]) for p in published
        ]
        assert len(shards.of(published[0].path)) == comm.size
        file.read(published[0].path)

    found = resuming.newest_good(Store(folder, 3), comm)
    assert found.path.name.startswith("step-0000000002")
    assert same(found.content, 2)
    assert found.content.groups["curvature"].attributes["eigenvalue"] == 2.5

    comm.allgather_object(None)
    if comm.rank == 0:
        shard = shards.of(found.path)[1]
        spoiled = bytearray(shard.read_bytes())
        spoiled[-5] ^= 1
        shard.write_bytes(spoiled)
    comm.allgather_object(None)
    older = resuming.newest_good(Store(folder, 3), comm)
    assert older.path.name.startswith("step-0000000001")
    assert same(older.content, 1)
    assert ".shard: damaged: bytes" in older.damaged[0]

    if comm.rank == comm.size - 1:
        file.write, write = unwritable, file.write
    save(3)
    assert not saver.settle()
    assert f"rank {comm.size - 1} on " in warned[0]
    assert "no space left" in warned[0]
    if comm.rank == comm.size - 1:
        file.write = write
    save(4)
    assert saver.settle(), "the next save is as good as any"
    assert same(resuming.load(folder / "step-0000000004-phase-001.h5", comm), 4)
    with pytest.raises(CollectiveError, match="no such file"):
        resuming.load(folder / "none.h5", comm)
    print(f"rank {comm.rank} of {comm.size} fine")
    comm.close()


def unwritable(path, *_):
    raise CheckpointError(f"{path}: cannot be written: no space left on the device")


if __name__ == "__main__":
    np.seterr(all="raise")
    main(Path(sys.argv[1]))
