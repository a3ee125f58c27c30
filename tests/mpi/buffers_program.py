"""Random small models trained by all ranks together: buffers_program.py FOLDER NAMES...

Rank 0 saves the state of each model; each of NAMES is a layer, or a seed.
"""

import sys
from pathlib import Path

import torch

from hpc_absa.comm import connect
from hpc_absa.training.equal_ranks import require_equal
from hpc_absa.training.reduction import OverlappedReduction, ReproducibleReduction
from tests.training import random_models
from tests.training.test_buffers import ours

PER_STEP = 3


def build(name):
    if name.isdecimal():
        return random_models.build(int(name)).double()
    return random_models.build(1, ["conv", name, "conv"]).double()


def main(folder, *names):
    torch.set_num_threads(1)
    comm = connect()
    for index, name in enumerate(names):
        steps = random_models.data(2, PER_STEP, dtype=torch.float64)
        reduction = (OverlappedReduction, ReproducibleReduction)[index % 2]
        model = ours(build(name), steps, 0.05, comm, reduction)
        require_equal({("model", k): v for k, v in model.state_dict().items()}, comm)
        if comm.rank == 0:
            torch.save(model.state_dict(), Path(folder) / f"{index}.pt")
    comm.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
