"""The live state of a run as a checkpoint's content, and back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpc_absa import __version__
from hpc_absa.checkpoint import Content, Group, Key
from hpc_absa.checkpoint.schema import Scalar
from hpc_absa.errors import CheckpointError
from hpc_absa.progress import Position
from hpc_absa.records import ScheduleState


@dataclass(frozen=True)
class Progress:
    """Everything that changes during a run and is not a tensor."""

    position: Position
    schedule: ScheduleState
    phase: int = 1
    """1-based; a new phase begins where batch or world size change."""
    epoch: int = 0
    """Epochs finished."""
    epoch_loss: float = 0.0
    """Sum of the training loss over the samples of the epoch begun."""
    epoch_samples: int = 0
    """Samples behind `epoch_loss`."""
    eigenvalue: float | None = None
    """The last estimate."""
    test_accuracy: float | None = None
    """The last evaluation."""


@dataclass(frozen=True)
class Live:
    """The objects whose tensors a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.SGD
    eigenvector: Tensor | None
    """Of the last estimate: the next one starts from it."""


def tensors(live: Live) -> dict[Key, Tensor]:
    """The tensors that a checkpoint holds, themselves, by group and name."""
    found = {("model", name): tensor for name, tensor in live.model.state_dict().items()}
    for name, parameter in live.model.named_parameters():
        momentum = live.optimizer.state.get(parameter, {}).get("momentum_buffer")
        if momentum is not None:
            found["optimizer", f"momentum.{name}"] = momentum
    if live.eigenvector is not None:
        found["curvature", "eigenvector"] = live.eigenvector
    return found


def scalars(progress: Progress, seed: int, digest: str, text: str) -> Content:
    """Everything else that a checkpoint says.

    Args:
        progress: how far the run has come.
        seed: the job's.
        digest: of the data set.
        text: the resolved job.
    """
    position, schedule = progress.position, progress.schedule
    rest = {
        field.name: getattr(progress, field.name)
        for field in fields(progress)
        if field.name not in ("position", "schedule", "eigenvalue", "epoch")
    }
    return Content(
        attributes={"epoch": progress.epoch, "step": position.step},
        groups={
            "model": Group(),
            "optimizer": Group({"name": "sgd"}),
            "schedule": Group(_present(asdict(schedule) | {"waited": schedule.patience_count})),
            "data": Group(
                {
                    "seed": seed,
                    "digest": digest,
                    "epoch": progress.epoch,
                    "position": position.microbatch,
                    "boundary": position.boundary,
                }
            ),
            "progress": Group(_present(rest)),
            "rng": Group({"seed": seed, "rule": "seed and microbatch index"}),
            "curvature": Group(_present({"eigenvalue": progress.eigenvalue})),
            "job": Group({"text": text}),
            "versions": Group(
                {
                    "hpc_absa": __version__,
                    "torch": str(torch.__version__),
                    "numpy": np.__version__,
                    "python": sys.version.split()[0],
                }
            ),
        },
    )


def described(content: Content, *, world_size: int, global_batch: int, samples: int) -> Content:
    """`content` with the root attributes that people and other programs read first."""
    extra = {"world_size": world_size, "global_batch": global_batch, "samples": samples}
    return replace(content, attributes={**content.attributes, **extra})


def restore(
    content: Content, live: Live, origin: str, kind: type[ScheduleState] = ScheduleState
) -> tuple[Live, Progress]:
    """Put a checkpoint's tensors into `live`; returns it with the eigenvector, and the progress.

    `kind` is the class of the schedule's states.

    Raises:
        CheckpointError: the checkpoint is of another model; names the first difference.
    """
    groups = content.groups
    load_model(live.model, groups["model"].arrays, origin)
    for name, parameter in live.model.named_parameters():
        array = groups["optimizer"].arrays.get(f"momentum.{name}")
        if array is not None:
            live.optimizer.state[parameter]["momentum_buffer"] = _like(parameter, array)
    vector = groups["curvature"].arrays.get("eigenvector")
    data = groups["data"].attributes
    position = Position(
        int(data["position"]), int(content.attributes["step"]), int(data["boundary"])
    )
    known = {field.name for field in fields(kind)}
    saved = groups["schedule"].attributes
    remembered = {"patience_count": saved["waited"]} if "waited" in saved else {}
    remembered |= {k: v for k, v in saved.items() if k in known}
    schedule = kind(**remembered)  # type: ignore[arg-type]
    progress = Progress(
        position,
        schedule,
        epoch=int(data["epoch"]),
        eigenvalue=groups["curvature"].attributes.get("eigenvalue"),  # type: ignore[arg-type]
        **groups["progress"].attributes,  # type: ignore[arg-type]
    )
    eigenvector = None if vector is None else torch.from_numpy(vector.copy())
    return replace(live, eigenvector=eigenvector), progress


def load_model(model: nn.Module, arrays: Mapping[str, np.ndarray], origin: str) -> None:
    """Put saved parameters and buffers into `model`; errors as `restore`."""
    state = model.state_dict()
    for name in sorted(state.keys() ^ arrays.keys()):
        where = "the model" if name in state else "the checkpoint"
        raise CheckpointError(f"{origin}: of another model: {name} is only in {where}")
    for name, tensor in state.items():
        shape = arrays[name].shape
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{origin}: of another model: {name} has shape {list(shape)}, "
                f"the model's has {list(tensor.shape)}"
            )
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(_like(tensor, arrays[name]))


def _present(values: Mapping[str, Any]) -> dict[str, Scalar]:
    """HDF5 attributes have no None: what is absent is left out."""
    return {key: value for key, value in values.items() if value is not None}


def _like(tensor: Tensor, array: np.ndarray) -> Tensor:
    """The saved values on the device of `tensor`, and bfloat16 from its bits."""
    saved = torch.from_numpy(array.copy())
    if tensor.dtype == torch.bfloat16:
        saved = saved.view(torch.bfloat16)
    return torch.empty_like(tensor).copy_(saved)  # in its memory format, too
