"""Checks that torch, Horovod, mpi4py and h5py work together; bootstrap.sh runs it last.

Alone it imports them, makes sure that exactly one libmpi is loaded, and with ``--write`` records
what it found. Under ``mpirun -np N`` with ``--ranks N`` it compares an allreduce of Horovod with
mpi4py's.
"""

import argparse
import json
import os
import platform
import re
import sys
from pathlib import Path


def loaded_libmpi() -> list[str]:
    """The libmpi files that this process has mapped (Linux)."""
    maps = os.fsdecode(Path("/proc/self/maps").read_bytes())
    return sorted(set(re.findall(r" (/.*/libmpi(?:_cray|_gnu\S*|ch)?\.so[.\d]*)$", maps, re.M)))


def main() -> None:
    """Run the checks; any failure ends the process with a message and a non-zero status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--route", choices=["site", "package"])
    parser.add_argument("--mpirun")
    parser.add_argument("--mpi-version")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()

    import h5py
    import horovod
    import horovod.torch as hvd
    import torch
    from mpi4py import MPI

    if not hvd.mpi_built():
        sys.exit("selfcheck: this Horovod was built without MPI")
    libraries = loaded_libmpi()
    if len({os.path.realpath(path) for path in libraries}) != 1:
        sys.exit(
            f"selfcheck: Horovod and mpi4py must load one and the same libmpi, not {libraries}"
        )
    if args.route == "package" and not libraries[0].startswith(sys.prefix):
        sys.exit(f"selfcheck: {libraries[0]} was loaded, expected one under {sys.prefix}")

    hvd.init()
    world = MPI.COMM_WORLD
    if (hvd.size(), hvd.rank()) != (world.size, world.rank) or world.size != args.ranks:
        sys.exit(
            f"selfcheck: Horovod is rank {hvd.rank()} of {hvd.size()}, mpi4py is rank {world.rank} "
            f"of {world.size}, expected {args.ranks} ranks"
        )
    mine = torch.arange(5, dtype=torch.float64) + world.rank
    by_horovod = hvd.allreduce(mine, op=hvd.Sum)
    by_mpi4py = torch.from_numpy(world.allreduce(mine.numpy()))
    if not torch.equal(by_horovod, by_mpi4py):
        sys.exit(f"selfcheck: Horovod sums to {by_horovod}, mpi4py to {by_mpi4py}")

    if args.write:
        found = {
            "format": 1,
            "python": platform.python_version(),
            "prefix": sys.prefix,
            "mpi": {
                "route": args.route,
                "version": args.mpi_version,
                "mpirun": args.mpirun,
                "prefix": os.path.dirname(os.path.dirname(args.mpirun)),
                "library": libraries[0],
                "library_version": MPI.Get_library_version().split(",")[0].strip("\0\n "),
            },
            "horovod": {
                "version": horovod.__version__,
                "gloo": bool(hvd.gloo_built()),
                "nccl": bool(hvd.nccl_built()),
            },
            "torch": torch.__version__,
            "h5py": h5py.__version__,
            "hdf5": h5py.version.hdf5_version,
        }
        args.write.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"rank {world.rank} of {world.size}: {libraries[0]}, sums agree")
    hvd.shutdown()


if __name__ == "__main__":
    main()
