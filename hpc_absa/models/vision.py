"""torchvision's models, and the import of torchvision itself, which wants help over CPU PyTorch."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hpc_absa import plugins
from hpc_absa.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

_kept: list[Any] = []
"""Declared operators last as long as the object that declared them."""


@cache
def torchvision() -> ModuleType:
    """The module torchvision; the one place that imports it.

    The package index has torchvision built against CUDA PyTorch only. Over CPU PyTorch its compiled
    operators do not load and its import fails because two of them, nms and qnms, are not declared.
    Where that happens they are declared here and the import is repeated: models, transforms and
    data sets then work, the two operators (of object detection) do not.

    Raises:
        UsageError: torchvision is missing, or does not go with this torch.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise UsageError(f"torchvision cannot be imported ({error}); install it") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise UsageError(
                f"torchvision does not go with this torch ({error}); `hpc-absa doctor` says more"
            ) from error
    _forget_half_imported()
    _declare_operators()
    return importlib.import_module("torchvision")


def names() -> list[str]:
    """All of torchvision's classification models."""
    return list(_models().list_models(module=_models()))


def build(name: str, arguments: Mapping[str, Any], channels: int, classes: int) -> nn.Module:
    """A classification model of torchvision's with fresh weights.

    The auxiliary classifiers of `googlenet` and `inception_v3` are off where the job does not ask
    for them, because a loss takes one output.

    Raises:
        UsageError: Other than three channels, or an argument that the model has not.
    """
    if channels != 3:
        raise UsageError(
            f"model.name: torchvision's {name} takes pictures with 3 channels, the data set has "
            f"{channels}"
        )
    given = dict(arguments)
    if name in ("googlenet", "inception_v3"):
        given = {"aux_logits": False, "init_weights": True, **given}
    try:
        return _models().get_model(name, weights=None, num_classes=classes, **given)
    except TypeError as error:
        unknown = [key for key in arguments if key not in _arguments(name)]
        if not unknown:
            raise UsageError(f"model: {name} cannot be built: {error}") from error
        raise UsageError(
            f"model.{unknown[0]}: {name} has no such argument; "
            f"{plugins.valid_ones(_arguments(name))}"
        ) from error


def _models() -> Any:
    torchvision()
    return importlib.import_module("torchvision.models")


def _arguments(name: str) -> list[str]:
    """What a model's class takes besides what its builder or we give it ourselves."""
    import torch

    with torch.device("meta"):  # no memory, no random numbers
        model = _models().get_model(name, weights=None)
    skipped = {"self", "num_classes", "block", "layers", "args", "kwargs"}
    return [key for key in inspect.signature(type(model).__init__).parameters if key not in skipped]


def _forget_half_imported() -> None:
    for name in [key for key in sys.modules if key.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _kept.append(library)
