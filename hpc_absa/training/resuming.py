"""Reading a checkpoint into every rank: each byte from the file system once, then over MPI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hpc_absa.checkpoint import Content, Store, file
from hpc_absa.checkpoint.file import Image
from hpc_absa.checkpoint.store import none_good, require_name
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.errors import CollectiveError

CHUNK = 1 << 30
"""Bytes of one broadcast: MPI counts are 32-bit."""


@dataclass(frozen=True)
class Resumed:
    """What a world goes on from; the same on all ranks."""

    path: Path
    content: Content
    damaged: tuple[str, ...]
    """Newer ones that were passed over, and why."""


def newest_good(store: Store, comm: Communicator) -> Resumed | None:
    """The newest checkpoint that verifies, None where there is none at all (a collective).

    Raises:
        CollectiveError: there are checkpoints, and every one is damaged.
    """
    damaged: list[str] = []
    for path in comm.broadcast_object(store.newest_first()):
        try:
            return Resumed(path, load(path, comm), tuple(damaged))
        except CollectiveError as error:
            damaged.append(str(error))
            store.pass_over(path)

    def refuse() -> None:
        if damaged:
            raise none_good(store.folder, damaged)

    raise_on_all_ranks(comm, refuse)
    return None


def load(path: Path, comm: Communicator) -> Content:
    """One checkpoint, verified; rank 0 reads its own file and each rank a share of its shards.

    A collective.

    Raises:
        CollectiveError: on all ranks, where it is damaged or no checkpoint.
    """
    image = _broadcast(
        raise_on_all_ranks(comm, lambda: _own(path) if comm.rank == 0 else None), comm, 0
    )
    content = image.content()
    own = dict(image.fingerprints) if comm.rank == 0 else {}
    shards = list(image.outline.shards.items())
    mine = raise_on_all_ranks(
        comm,
        lambda: {
            number: file.load_shard(path.with_name(name), digest)
            for number, (name, digest) in enumerate(shards)
            if number % comm.size == comm.rank
        },
    )
    for shard in mine.values():
        own |= shard.fingerprints
    for number in range(len(shards)):
        shard = _broadcast(mine.get(number), comm, number % comm.size)
        content = file.joined(content, shard.content())
    found = {key: of for rank in comm.allgather_object(own) for key, of in rank.items()}
    raise_on_all_ranks(
        comm,
        lambda: file.require_digest(path, content.digest(found), image.outline.digest),
    )
    return content


def _own(path: Path) -> Image:
    """The checkpoint's own file."""
    image = file.load(path)
    require_name(path, image.outline.attributes)
    return image


def _broadcast(image: Image | None, comm: Communicator, root: int) -> Image:
    """The root's image on every rank."""
    if comm.size == 1:
        assert image is not None
        return image
    outline, size = comm.broadcast_object(
        (image.outline, len(image.bytes)) if image else None, root
    )
    received = image.bytes if image else np.empty(size, np.uint8)
    for chunk in torch.from_numpy(received).split(CHUNK):
        comm.broadcast_(chunk, root)
    return Image(outline, received)
