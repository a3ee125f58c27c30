"""Horovod/MPI training whose batch and ranks grow as the loss surface becomes flatter.

The names below are for scripts with a training loop of their own (`docs/library.md`); each is
imported when it is first used, so that `import hpc_absa` takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hpc_absa.torchvision_import import prepare_torchvision

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hpc_absa.curvature.standalone import spectrum, top_eigenvalue
    from hpc_absa.data.datasets import Datasets
    from hpc_absa.errors import HpcAbsaError
    from hpc_absa.schedules import ABS, ABSA, BL, FB, GG, GNS, ABSATuned, UserDefined
    from hpc_absa.training.contents import Checkpoint, load_checkpoint
    from hpc_absa.training.device import device
    from hpc_absa.training.script import Run
    from hpc_absa.training.script_step import Step

_MODULES = {
    "Run": "training.script",
    "Step": "training.script_step",
    "device": "training.device",
    **dict.fromkeys(
        ("ABS", "ABSA", "ABSATuned", "BL", "FB", "GG", "GNS", "UserDefined"), "schedules"
    ),
    "Checkpoint": "training.contents",
    "Datasets": "data.datasets",
    "load_checkpoint": "training.contents",
    "spectrum": "curvature.standalone",
    "top_eigenvalue": "curvature.standalone",
    "HpcAbsaError": "errors",
}
"""Modules of the public names."""

__all__ = [
    "ABS",
    "ABSA",
    "BL",
    "FB",
    "GG",
    "GNS",
    "ABSATuned",
    "Checkpoint",
    "Datasets",
    "HpcAbsaError",
    "Run",
    "Step",
    "UserDefined",
    "device",
    "load_checkpoint",
    "spectrum",
    "top_eigenvalue",
]


prepare_torchvision()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
