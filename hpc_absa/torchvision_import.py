"""The import of torchvision, which fails with a CPU build of PyTorch unless it is prepared."""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType
from typing import Any

from hpc_absa.errors import UsageError

_libraries: list[Any] = []
"""Declared operators exist as long as the object that declared them."""


@cache
def torchvision() -> ModuleType:
    """Import torchvision; no other place does.

    The package index has torchvision built against CUDA PyTorch only. With CPU PyTorch its compiled
    operators do not load, and its import fails because two of them, nms and qnms, are not declared.
    In that case they are declared here and the import is repeated: models, transforms and data sets
    then work, the two operators (of object detection) do not.

    Raises:
        UsageError: torchvision is missing, or does not fit this torch.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        raise UsageError(f"torchvision cannot be imported ({error}); install it") from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise UsageError(
                f"torchvision does not fit this torch ({error}); see `hpc-absa doctor`"
            ) from error
    for name in [key for key in sys.modules if key.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # of the import that failed halfway
    _declare_operators()
    return importlib.import_module("torchvision")


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
