"""The state of a run, its content as a checkpoint, and back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hpc_absa import __version__
from hpc_absa.checkpoint import Content, Group, Key, Scalar
from hpc_absa.checkpoint.format import Place
from hpc_absa.checkpoint.restore import as_array
from hpc_absa.errors import CheckpointError, UsageError
from hpc_absa.plugins import user_code
from hpc_absa.progress import Position, Progress
from hpc_absa.records import ScheduleState
from hpc_absa.training import nested

OPTIMIZER_NAMES = {"momentum_buffer": "momentum"}
"""Names of optimizer state in a checkpoint, where they differ from torch's."""

FORMER_SCHEDULE_NAMES = {"patience_count": "waited"}
"""Attributes of `/schedule` with a new name; written under both for one release."""

EIGENVECTOR: Key = ("curvature", "eigenvector")

JSON = "json"
"""The array of a group with what is no tensor, as JSON in UTF-8 (`hpc_absa.training.nested`)."""


class Stateful(Protocol):
    """An object whose state is in the checkpoint: a scheduler, a moving average, a scaler."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state_dict: Any, /) -> Any: ...


@dataclass
class TrainState:
    """What training changes, and what a checkpoint contains."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    progress: Progress
    eigenvector: Tensor | None = None
    """[P], of the last estimate; the next one starts from it."""
    others: Mapping[str, Stateful] = field(default_factory=dict)
    """By name, whatever else has a state."""
    with_groups: bool = False
    """Whether the options of the optimizer's parameter groups, such as the learning rates, are part
    of the state; those of a job file are in the job."""
    restore_groups: bool = True
    """Whether `restore` takes them over."""

    def tensors(self) -> dict[Key, Tensor]:
        """The tensors that a checkpoint contains, themselves, by group and name.

        Raises:
            UsageError: a state is not made of tensors, numbers and strings, that of the model not
                of tensors, or the optimizer has parameters of its own.
        """
        tensors: dict[Key, Tensor] = {}
        for name, value in self.model.state_dict().items():
            if not isinstance(value, Tensor):
                raise UsageError(
                    f"the model's {name} is of type {type(value).__name__}; checkpoints contain "
                    "tensors only: return a tensor from get_extra_state"
                )
            tensors["model", name] = value
        tensors |= self._optimizer_tensors()
        if self.eigenvector is not None:
            tensors[EIGENVECTOR] = self.eigenvector
        return tensors | self.other_tensors()

    def other_tensors(self) -> dict[Key, Tensor]:
        """Those of `others`."""
        if not self.others:
            return {}
        found: nested.Tensors = {}
        nodes = {
            name: nested.encode(other.state_dict(), name, found, f"state[{name!r}]")
            for name, other in self.others.items()
        }
        found[JSON] = nested.to_tensor(nodes)
        return {("state", name): tensor for name, tensor in found.items()}

    def _optimizer_tensors(self) -> dict[Key, Tensor]:
        if self.with_groups:  # some may have been added since the start
            require_own_parameters(self.optimizer, self.model)
        found: nested.Tensors = {}
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        state: list[Any] = []
        for of, values in self.optimizer.state.items():
            name = names.get(of) if isinstance(of, nn.Parameter) else None
            nodes = {
                key: nested.encode(
                    value, f"{OPTIMIZER_NAMES.get(key, key)}.{name or of}", found, "optimizer"
                )
                for key, value in (values.items() if isinstance(values, dict) else [])
            }
            state.append([name, None if name else of, nodes])
        groups = [
            {
                "params": [names[p] for p in group["params"]],
                "options": nested.encode(
                    {key: value for key, value in group.items() if key != "params"},
                    f"group.{index}",
                    found,
                    "optimizer",
                ),
            }
            for index, group in enumerate(self.optimizer.param_groups)
            if self.with_groups
        ]
        found[JSON] = nested.to_tensor({"state": state, "groups": groups})
        return {("optimizer", name): tensor for name, tensor in found.items()}

    def scalars(self, seed: int, data_digest: str, job: str, **attributes: Scalar) -> Content:
        """Everything else that a checkpoint contains.

        Args:
            seed: of the job.
            data_digest: of the data set.
            job: the resolved job file.
            attributes: further root attributes.
        """
        progress, position = self.progress, self.progress.position
        schedule = asdict(progress.schedule)
        schedule |= {old: schedule[new] for new, old in FORMER_SCHEDULE_NAMES.items()}
        versions = {
            "hpc_absa": __version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": sys.version.split()[0],
        }
        data: dict[str, Scalar] = {
            "seed": seed,
            "digest": data_digest,
            "epoch": progress.epoch,
            "position": position.microbatch,
            "boundary": position.boundary,
        }
        rest = ("phase", "epoch_loss", "epoch_samples", "test_accuracy")
        return Content(
            {"epoch": progress.epoch, "step": position.step, **attributes},
            {
                "model": Group(),
                "optimizer": Group({"name": type(self.optimizer).__name__.lower()}),
                **({"state": Group()} if self.others else {}),
                "schedule": _group(schedule),
                "data": Group(data),
                "progress": _group({name: getattr(progress, name) for name in rest}),
                "rng": Group({"seed": seed, "rule": "seed and microbatch index"}),
                "curvature": _group({"eigenvalue": progress.eigenvalue}),
                "job": Group({"text": job}),
                "versions": Group(versions),
            },
        )

    def memory(self, places: Mapping[Key, Place]) -> dict[Key, Tensor]:
        """Tensors to read a checkpoint's arrays into, which `restore` then need not copy.

        Those of the model, and present or new ones for the rest, where type and layout fit.
        """
        tensors: dict[Key, Tensor] = {}
        for name, tensor in self.model.state_dict().items():
            if isinstance(tensor, Tensor):
                tensors["model", name] = tensor
        parameters, keys = dict(self.model.named_parameters()), _optimizer_keys()
        for group, saved in places:
            key, _, name = saved.partition(".")
            if group == "optimizer" and (parameter := parameters.get(name)) is not None:
                present = self.optimizer.state.get(parameter, {}).get(keys.get(key, key))
                like = present if isinstance(present, Tensor) else torch.empty_like(parameter)
                tensors[group, saved] = like
            elif (group, saved) == EIGENVECTOR:
                place = places[EIGENVECTOR]
                tensors[EIGENVECTOR] = torch.from_numpy(np.empty(place.shape, place.dtype))
        return {
            key: tensor
            for key, tensor in tensors.items()
            if key in places and _fits(tensor, places[key])
        }

    def restore(
        self, content: Content, origin: str, memory: Mapping[Key, Tensor] = MappingProxyType({})
    ) -> None:
        """Take over the state of a checkpoint.

        Args:
            content: of the checkpoint.
            origin: its name.
            memory: tensors of `memory` whose memory the arrays of `content` are in.

        Raises:
            CheckpointError: it is of another model; names the first difference.
        """
        groups = content.groups
        load_model(self.model, groups["model"].arrays, origin)
        self._restore_optimizer(groups["optimizer"].arrays, memory)
        self._restore_others(groups, origin)
        vector = groups["curvature"].arrays.get("eigenvector")
        if (read := memory.get(EIGENVECTOR)) is not None or vector is None:
            self.eigenvector = read
        else:
            self.eigenvector = torch.from_numpy(vector.copy())
        data = groups["data"].attributes
        position = Position(
            int(data["position"]), int(content.attributes["step"]), int(data["boundary"])
        )
        eigenvalue = groups["curvature"].attributes.get("eigenvalue")
        self.progress = Progress(
            position,
            _schedule_state(type(self.progress.schedule), groups["schedule"].attributes),
            epoch=int(data["epoch"]),
            eigenvalue=eigenvalue,  # type: ignore[arg-type]
            **groups["progress"].attributes,  # type: ignore[arg-type]
        )

    def _restore_optimizer(
        self, arrays: Mapping[str, np.ndarray], memory: Mapping[Key, Tensor]
    ) -> None:
        parameters = dict(self.model.named_parameters())
        if JSON in arrays:
            saved_state = nested.from_array(arrays[JSON])
            for name, other, nodes in saved_state["state"]:
                of = parameters[name] if name else other
                self.optimizer.state[of] = {
                    key: nested.decode(
                        node, _optimizer_tensor(key, arrays, parameters.get(name), memory)
                    )
                    for key, node in nodes.items()
                }
            if self.with_groups and self.restore_groups:
                self._restore_groups(saved_state["groups"], arrays, parameters)
            return
        keys = _optimizer_keys()
        for saved, array in arrays.items():
            key, _, name = saved.partition(".")
            if name in parameters:
                value = _like(parameters[name], array)
                self.optimizer.state[parameters[name]][keys.get(key, key)] = value

    def _restore_groups(
        self,
        groups: list[Any],
        arrays: Mapping[str, np.ndarray],
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        """Also the parameters of each group: some are added during a run, as to unfreeze them."""
        param_groups = self.optimizer.param_groups
        del param_groups[len(groups) :]
        for index, saved in enumerate(groups):
            if index == len(param_groups):
                param_groups.append({})
            options = nested.decode(saved["options"], _optimizer_tensor("", arrays, None, {}))
            param_groups[index].clear()
            param_groups[index].update(
                params=[parameters[name] for name in saved["params"]], **options
            )

    def _restore_others(self, groups: Mapping[str, Group], origin: str) -> None:
        arrays = groups["state"].arrays if "state" in groups else {}
        nodes = nested.from_array(arrays[JSON]) if JSON in arrays else {}
        for name in sorted(nodes.keys() ^ self.others.keys()):
            where = "the run" if name in self.others else "the checkpoint"
            raise CheckpointError(f"{origin}: of another run: state[{name!r}] is only in {where}")
        device = next(self.model.parameters()).device

        def tensor(node: Mapping[str, Any]) -> Tensor:
            saved = nested.saved_tensor(node, arrays[node["tensor"]])
            return saved.clone() if node["device"] == "cpu" else saved.to(device)

        for name, other in self.others.items():
            with user_code(f"{origin}: state[{name!r}].load_state_dict"):
                other.load_state_dict(nested.decode(nodes[name], tensor))


def require_own_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """
    Raises:
        UsageError: a parameter of the optimizer is not one of the model.
    """
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
        raise UsageError(
            "the optimizer has parameters that the model has not, whose gradients would not be "
            "reduced: make them part of the model"
        )


def _optimizer_tensor(
    key: str,
    arrays: Mapping[str, np.ndarray],
    parameter: Tensor | None,
    memory: Mapping[Key, Tensor],
) -> Callable[[Mapping[str, Any]], Tensor]:
    """Restores a tensor of `optimizer.state[parameter][key]`, as `Optimizer.load_state_dict` does.

    It is on the parameter's device, but a step counter where it was, and has its memory format.
    """

    def restore(node: Mapping[str, Any]) -> Tensor:
        saved = nested.saved_tensor(node, arrays[node["tensor"]])
        if parameter is None or (key == "step" and node["device"] == "cpu"):
            return saved.clone()
        if (read := memory.get(("optimizer", node["tensor"]))) is not None:
            return read
        if saved.shape != parameter.shape:
            return saved.to(parameter.device, copy=True)
        return torch.empty_like(parameter, dtype=saved.dtype, requires_grad=False).copy_(saved)

    return restore


def _optimizer_keys() -> dict[str, str]:
    """Keys of optimizer state by their names in a checkpoint, where they differ."""
    return {saved: key for key, saved in OPTIMIZER_NAMES.items()}


def _fits(tensor: Tensor, place: Place) -> bool:
    """Whether the bytes at `place` are those of `tensor` in memory."""
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return False
    array = as_array(tensor)
    return (array.dtype.str, array.shape) == (place.dtype, place.shape)


def require_same_model(
    model: nn.Module, shapes: Mapping[str, tuple[int, ...]], origin: str
) -> None:
    """Refuse parameters and buffers of other names or shapes; errors as `TrainState.restore`."""
    state = model.state_dict()
    for name in sorted(state.keys() ^ shapes.keys()):
        where = "the model" if name in state else "the checkpoint"
        raise CheckpointError(f"{origin}: of another model: {name} is only in {where}")
    for name, tensor in state.items():
        if shapes[name] != tuple(tensor.shape):
            raise CheckpointError(
                f"{origin}: of another model: {name} has shape {list(shapes[name])}, "
                f"the model's has {list(tensor.shape)}"
            )


def load_model(model: nn.Module, arrays: Mapping[str, np.ndarray], origin: str) -> None:
    """Copy saved parameters and buffers into `model`; errors as `TrainState.restore`."""
    state = model.state_dict()
    require_same_model(model, {name: array.shape for name, array in arrays.items()}, origin)
    modules = dict(model.named_modules())
    with torch.no_grad():
        for name, tensor in state.items():
            path, _, last = name.rpartition(".")
            if last == "_extra_state":
                modules[path].set_extra_state(_like(tensor, arrays[name]))
                continue
            saved = _saved(arrays[name], tensor.dtype)
            if saved.data_ptr() != tensor.data_ptr():  # else it was read into the model's memory
                tensor.copy_(saved)


def _schedule_state(kind: type[ScheduleState], saved: Mapping[str, Any]) -> ScheduleState:
    known = {field.name for field in fields(kind)}
    former = {new: saved[old] for new, old in FORMER_SCHEDULE_NAMES.items() if old in saved}
    return kind(**{**former, **{key: saved[key] for key in saved.keys() & known}})


def _group(values: Mapping[str, Any]) -> Group:
    """HDF5 attributes have no None: such values are left out."""
    return Group({key: value for key, value in values.items() if value is not None})


def to_array(tensor: Tensor) -> np.ndarray:
    """A copy as a checkpoint has it."""
    return as_array(tensor.detach().cpu().clone())


def _like(tensor: Tensor, array: np.ndarray) -> Tensor:
    """The saved values with the device, type and memory format of `tensor`."""
    saved = _saved(array, tensor.dtype)
    if saved.shape != tensor.shape:  # such as the step counter of an optimizer
        return saved.to(tensor.device, copy=True)
    return torch.empty_like(tensor).copy_(saved)


def _saved(array: np.ndarray, dtype: torch.dtype) -> Tensor:
    """A saved array as a tensor that shares its memory; bfloat16 was saved as its bits."""
    saved = torch.from_numpy(array)
    if saved.dtype == torch.uint16 and dtype != torch.uint16:
        return saved.view(torch.bfloat16)
    return saved
