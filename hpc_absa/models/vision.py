"""torchvision's classification models by name."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpc_absa import plugins
from hpc_absa.errors import UsageError
from hpc_absa.torchvision_import import torchvision

if TYPE_CHECKING:
    from torch import nn


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
