"""A large state saved and restored by all ranks together: saving_program.py FOLDER."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from hpc_absa.checkpoint import CheckpointManager, Content, Group, file, integrity, restore
from hpc_absa.checkpoint.async_checkpointer import AsyncCheckpointer
from hpc_absa.checkpoint.integrity import VerifiedFile
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
    integrity.CHUNK = 1 << 15
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
    check_reading(folder, comm)
    with pytest.raises(CollectiveError, match="no such file"):
        restore.load(folder / "none.h5", comm)
    print(f"rank {comm.rank} of {comm.size} fine")
    comm.close()


def check_reading(folder, comm):
    """Of a file of many chunks, into given memory, with the help of ranks that see it."""
    path = folder / "whole.h5"
    if comm.rank == 0:
        arrays = {key: tensor.numpy() for key, tensor in state(7).items()}
        file.write(path, scalars(7).with_arrays(arrays))
    comm.allgather_object(None)
    target, read, read_chunk = torch.zeros(40_000), [], integrity.read_chunk

    def counted(descriptor, start, into):
        read.append(start)
        return read_chunk(descriptor, start, into)

    integrity.read_chunk = counted
    assert same(restore.load(path, comm, lambda header: {("model", "w0"): target}), 7)
    assert torch.equal(target, state(7)["model", "w0"])
    chunks = sorted(start for each in comm.allgather_object(read) for start in each if start)
    block = integrity.block_size(sum(tensor.nbytes for tensor in state(7).values()))
    assert chunks == list(range(block, path.stat().st_size, integrity.CHUNK)), "each once"
    assert read.count(0) == 1 < len(read), "by all ranks"

    if comm.rank == 1:
        restore.VerifiedFile = invisible
    assert same(restore.load(path, comm), 7)
    restore.VerifiedFile = VerifiedFile
    integrity.read_chunk = read_chunk
    comm.allgather_object(None)
    if comm.rank == 0:
        flip_bit(path, chunks[-2] + 5)
    comm.allgather_object(None)
    with pytest.raises(CollectiveError, match="damaged: bytes"):
        restore.load(path, comm)


def invisible(path):
    raise CheckpointError(f"{path}: no such file")


def unwritable(path, *_, **__):
    raise CheckpointError(f"{path}: cannot be written: no space left on the device")


if __name__ == "__main__":
    np.seterr(all="raise")
    main(Path(sys.argv[1]))
