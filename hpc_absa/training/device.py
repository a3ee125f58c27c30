"""The device of this rank, before the ranks are connected."""

from __future__ import annotations

import torch

from hpc_absa.allocation import launcher_local_rank
from hpc_absa.errors import UsageError


def device() -> torch.device:
    """A GPU of this rank's own where the host has GPUs, otherwise the CPU.

    The GPU becomes torch's current one.

    Raises:
        UsageError: the host has fewer GPUs than ranks.
    """
    gpus = torch.cuda.device_count()
    if not gpus:
        return torch.device("cpu")
    local_rank = launcher_local_rank()
    if local_rank >= gpus:
        raise UsageError(
            f"rank {local_rank} of a host with {gpus} GPUs: expected one GPU a rank; lower the "
            "number of ranks, or use the CPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
