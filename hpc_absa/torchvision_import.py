"""The import of torchvision, which fails with a CPU build of PyTorch unless it is prepared."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
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


def prepare_torchvision() -> None:
    """Make `import torchvision` in a user's module do the same."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder:
    """Finds torchvision only, with another loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is not None and spec.origin and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(fullname, spec.origin)
        return spec


class _Loader(SourceFileLoader):
    """Executes the package a second time, with the operators declared, if that is what it lacks."""

    def exec_module(self, module: ModuleType) -> None:
        try:
            super().exec_module(module)
        except RuntimeError as error:
            if "torchvision::" not in str(error):
                raise
            for key in [key for key in sys.modules if key.startswith("torchvision.")]:
                del sys.modules[key]
            _declare_operators()
            super().exec_module(module)


def _declare_operators() -> None:
    torch: Any = sys.modules["torch"]  # torchvision has imported it
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)
