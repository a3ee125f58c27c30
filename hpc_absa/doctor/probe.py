"""Imports the packages that ranks import, and prints the results as one JSON object.

It is a separate process because importing two MPI libraries at once may abort it.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

LIBMPI = re.compile(r" (/.*/libmpi(?:_cray|_gnu\S*|ch)?\.so[.\d]*)$", re.MULTILINE)


def main() -> None:
    """Print the version or the error of each package, and what Horovod and torch support."""
    probed: dict[str, Any] = {
        name: _import(name) for name in ("torch", "h5py", "horovod", "horovod.torch", "mpi4py")
    }
    if mpi4py := sys.modules.get("mpi4py"):
        mpi4py.rc.initialize = False
        probed["mpi4py.MPI"] = _import("mpi4py.MPI")
    maps = os.fsdecode(Path("/proc/self/maps").read_bytes())
    probed["libmpi"] = sorted({str(Path(path).resolve()) for path in LIBMPI.findall(maps)})
    if torch := sys.modules.get("torch"):
        probed["cuda"] = torch.version.cuda
        probed["gpus"] = torch.cuda.device_count()
    if horovod := sys.modules.get("horovod.torch"):
        probed["built"] = {
            name: bool(getattr(horovod, f"{name}_built")()) for name in ("mpi", "gloo", "nccl")
        }
    print(json.dumps(probed))


def _import(name: str) -> dict[str, str]:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"version": str(getattr(module, "__version__", ""))}


if __name__ == "__main__":
    main()
