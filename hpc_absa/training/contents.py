"""A checkpoint as a script reads it: tensors and plain values, without a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_absa.checkpoint import read
from hpc_absa.errors import CheckpointError
from hpc_absa.rundir import RunDir
from hpc_absa.training import nested
from hpc_absa.training.state import JSON


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint contains."""

    path: Path
    step: int
    """Optimizer steps taken."""
    epoch: int
    """Epochs finished."""
    samples: int
    """Samples visited."""
    global_batch: int
    """Samples of the next step."""
    model: dict[str, Tensor]
    """The model's `state_dict`, on the CPU."""
    state: dict[str, Any]
    """By name, the `state_dict` of what the script gave to `Run` as `state`."""
    eigenvalue: float | None
    """The last estimate."""
    job: str
    """The resolved job file."""


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint, verified; of a run directory the newest good one.

    Example: `model.load_state_dict(hpc_absa.load_checkpoint("runs/lm").model)`

    Raises:
        CheckpointError: it is damaged or not a checkpoint; or there is no good one.
    """
    files = [Path(path)]
    if files[0].is_dir():
        files = RunDir(files[0]).checkpoint_files()[::-1]
        if not files:
            raise CheckpointError(f"{path}: no checkpoint in this folder")
    error: CheckpointError | None = None
    for file in files:
        try:
            return _load(file)
        except CheckpointError as raised:
            error = error or raised
    assert error is not None
    raise error


def _load(path: Path) -> Checkpoint:
    content = read(path)
    attributes, groups = content.attributes, content.groups
    arrays = groups["state"].arrays if "state" in groups else {}
    nodes = nested.from_array(arrays[JSON]) if JSON in arrays else {}

    def tensor(node: Mapping[str, Any]) -> Tensor:
        return nested.saved_tensor(node, arrays[node["tensor"]]).clone()

    eigenvalue = groups["curvature"].attributes.get("eigenvalue")
    return Checkpoint(
        path,
        int(attributes["step"]),
        int(attributes["epoch"]),
        int(attributes["samples"]),
        int(attributes["global_batch"]),
        {name: _tensor(array) for name, array in groups["model"].arrays.items()},
        {name: nested.decode(node, tensor) for name, node in nodes.items()},
        None if eigenvalue is None else float(eigenvalue),
        str(groups["job"].attributes["text"]),
    )


def _tensor(array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(array.copy())
    # PyTorch has no parameters of this type: they are the bits of bfloat16
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.uint16 else tensor
