"""Imports what ranks import, in a process of its own, and prints what came of it as JSON.

A process, because an import of two MPIs at once may end it: then that is what was found.
"""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

LIBMPI = re.compile(r"(/\S*/libmpi(?:_cray|_gnu\S*|ch)?\.so[.\d]*)$", re.MULTILINE)


def main() -> None:
    """Print one JSON object: by package its version or error, then what Horovod and torch have."""
    found: dict[str, Any] = {}
    for name in ("torch", "h5py", "horovod", "horovod.torch", "mpi4py"):  # as ranks do
        found[name] = _imported(name)
    mpi4py, torch, horovod = (_module(n) for n in ("mpi4py", "torch", "horovod.torch"))
    if mpi4py:
        mpi4py.rc.initialize = False
        found["mpi4py.MPI"] = _imported("mpi4py.MPI")
    found["libmpi"] = sorted(
        {str(Path(path).resolve()) for path in LIBMPI.findall(Path("/proc/self/maps").read_text())}
    )
    if torch:
        found["cuda"] = torch.version.cuda
        found["gpus"] = torch.cuda.device_count()
    if horovod:
        found["built"] = {
            what: bool(getattr(horovod, f"{what}_built")()) for what in ("mpi", "gloo", "nccl")
        }
    print(json.dumps(found))


def _imported(name: str) -> dict[str, str]:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    return {"version": str(getattr(module, "__version__", ""))}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception:
        return None


if __name__ == "__main__":
    main()
