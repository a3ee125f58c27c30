"""Reading a checkpoint on all ranks: each byte from the file system once, then over MPI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hpc_absa.checkpoint import file
from hpc_absa.checkpoint.file import Image
from hpc_absa.checkpoint.format import Content
from hpc_absa.checkpoint.manager import CheckpointManager
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.errors import CollectiveError, ExitStatus
from hpc_absa.rundir.paths import checkpoint_files

BROADCAST_BYTES = 1 << 30
"""Bytes of one broadcast: MPI counts are 32-bit."""


@dataclass(frozen=True)
class Restored:
    """The checkpoint that a run continues from; the same on all ranks."""

    path: Path
    content: Content
    damaged: tuple[str, ...]
    """What is wrong with newer ones."""


def newest_good(manager: CheckpointManager, comm: Communicator) -> Restored | None:
    """The newest checkpoint that verifies, None if there is none at all (a collective).

    Raises:
        CollectiveError: there are checkpoints, and all of them are damaged.
    """
    damaged: list[str] = []
    for path in reversed(comm.broadcast_object(checkpoint_files(manager.folder))):
        try:
            return Restored(path, load(path, comm), tuple(damaged))
        except CollectiveError as error:
            damaged.append(str(error))
            manager.mark_damaged(path)
    if damaged:
        raise CollectiveError(
            f"{manager.folder}: no checkpoint is good; remove the folder to start again: "
            + "; ".join(damaged),
            ExitStatus.FAILED,
        )
    return None


def load(path: Path, comm: Communicator) -> Content:
    """One checkpoint, verified; rank 0 reads its own file, and all ranks a part of its shards.

    Raises:
        CollectiveError: on all ranks, if it is damaged or not a checkpoint.
    """
    image = raise_on_all_ranks(comm, lambda: file.load(path) if comm.rank == 0 else None)
    image = _broadcast(image, comm, 0)
    content = image.outline.scalars.with_arrays(image.arrays())
    shards = list(image.outline.shards.items())
    mine = raise_on_all_ranks(
        comm,
        lambda: {
            number: file.load_shard(path.with_name(name), digest)
            for number, (name, digest) in enumerate(shards)
            if number % comm.size == comm.rank
        },
    )
    for number in range(len(shards)):
        shard = _broadcast(mine.get(number), comm, number % comm.size)
        content = content.with_arrays(shard.arrays())
    return content


def _broadcast(image: Image | None, comm: Communicator, root: int) -> Image:
    """The root's image on every rank."""
    if comm.size == 1:
        assert image is not None
        return image
    outline, size = comm.broadcast_object(
        (image.outline, len(image.bytes)) if image else None, root
    )
    received = image.bytes if image else np.empty(size, np.uint8)
    for chunk in torch.from_numpy(received).split(BROADCAST_BYTES):
        comm.broadcast_(chunk, root)
    return Image(outline, received)
