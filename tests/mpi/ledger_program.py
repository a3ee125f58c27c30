"""A rank of `hpc-absa train` that also records every sample it trains on.

usage: ledger_program.py LEDGER JOB RUN_DIR
"""

import os
import sys
from pathlib import Path

import numpy as np

from hpc_absa.data.loader import Loader
from hpc_absa.training import rank

visits: list[np.ndarray] = []
get = Loader.get


def recording(self, k, then=()):
    microbatch = get(self, k, then)
    visits.append(np.stack([microbatch.epochs, microbatch.samples], axis=1))
    return microbatch


if __name__ == "__main__":
    folder, job, run = map(Path, sys.argv[1:])
    Loader.get = recording  # type: ignore[method-assign]
    status = rank.main(job, run, (), ())
    import horovod.torch as hvd

    rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK", "0"))
    assert not hvd.is_initialized(), "a rank shuts Horovod down"
    name = f"{len(list(folder.glob(f'*-rank{rank}.npy')))}-rank{rank}.npy"
    np.save(folder / name, np.concatenate(visits) if visits else np.empty((0, 2), np.int64))
    sys.exit(status)
