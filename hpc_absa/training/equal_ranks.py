"""The same state on all ranks: checked by digests, or given by rank 0."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from xxhash import xxh3_64_intdigest

from hpc_absa.checkpoint import Key
from hpc_absa.comm import Communicator
from hpc_absa.errors import CollectiveError, ExitStatus
from hpc_absa.training import nested
from hpc_absa.training.state import JSON

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers by their size in bytes."""

COLUMNS = 4096
"""Of the sums in `digest`."""

STATES: Key = ("state", JSON)
"""What is no tensor in the states of a script."""


def require_equal(tensors: Mapping[Key, Tensor], comm: Communicator) -> None:
    """Compare the state of all ranks by digests (a collective); nothing to do on one rank.

    Raises:
        CollectiveError: on all ranks, with the first tensor that differs.
    """
    if comm.size == 1:
        return
    digests = {key: digest(tensor) for key, tensor in tensors.items()}
    if len(set(comm.allgather_object(xxh3_64_intdigest(repr(digests).encode())))) == 1:
        return
    ranks = comm.allgather_object({**_plain_values(tensors), **digests})
    for rank, other in enumerate(ranks):
        for key in sorted(other.keys() | ranks[0].keys(), key=lambda key: (key == STATES, key)):
            if other.get(key) != ranks[0].get(key):
                raise CollectiveError(
                    f"{'/'.join(key)} differs between rank 0 and rank {rank}: it is changed by "
                    "code that depends on the rank, or on a generator without a seed; nothing was "
                    "saved",
                    ExitStatus.FAILED,
                )


def _plain_values(tensors: Mapping[Key, Tensor]) -> dict[Key, int]:
    """Digests of the numbers and strings in each of a script's states."""
    if STATES not in tensors:
        return {}
    nodes = nested.from_array(tensors[STATES].numpy())
    return {("state", name): xxh3_64_intdigest(repr(node).encode()) for name, node in nodes.items()}


def broadcast_model(model: nn.Module, comm: Communicator) -> None:
    """Give all ranks the weights and buffers of rank 0 (a collective)."""
    if comm.size == 1:
        return
    for tensor in model.state_dict().values():
        if isinstance(tensor, Tensor):
            values = tensor.detach().contiguous().clone()
            comm.broadcast_(values.view(-1).view(torch.uint8))
            with torch.no_grad():
                tensor.copy_(values)


def digest(tensor: Tensor) -> int:
    """XXH3-64 of the bytes; on a GPU of sums over columns of them, which are computed there."""
    tensor = tensor.detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    flat = tensor.contiguous().view(-1).view(BITS[tensor.element_size()])
    rows = len(flat) // COLUMNS if flat.is_cuda else 0
    columns = flat[: rows * COLUMNS].view(rows, COLUMNS).sum(dim=0, dtype=torch.int64)
    rest = xxh3_64_intdigest(flat[rows * COLUMNS :].cpu().numpy().data)
    return xxh3_64_intdigest(columns.cpu().numpy().data, rest) if rows else rest
