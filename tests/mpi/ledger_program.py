"""A rank of `hpc-absa train` that also writes down every sample it trains on.

usage: ledger_program.py LEDGER JOB RUN_DIR
"""

import os
import sys
from pathlib import Path

import numpy as np

from hpc_absa.data.batches import Batches
from hpc_absa.training import worker

visits: list[np.ndarray] = []
prefetch = Batches.prefetch


def noting(self, ks):
    for microbatch in prefetch(self, ks):
        visits.append(np.stack([microbatch.epochs, microbatch.samples], axis=1))
        yield microbatch


if __name__ == "__main__":
    folder, job, run = map(Path, sys.argv[1:])
    Batches.prefetch = noting  # type: ignore[method-assign]
    status = worker.main(job, run, (), ())
    import horovod.torch as hvd

    rank = os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK", "0"))
    assert not hvd.is_initialized(), "the worker leaves its world in order"
    name = f"{len(list(folder.glob(f'*-rank{rank}.npy')))}-rank{rank}.npy"
    np.save(folder / name, np.concatenate(visits) if visits else np.empty((0, 2), np.int64))
    sys.exit(status)
