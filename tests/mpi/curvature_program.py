"""Estimates on every rank of a world; rank 0 prints what all of them found, as JSON."""

import hashlib
import json
import sys

import torch

from hpc_absa.comm import connect
from hpc_absa.curvature.probe import estimate
from tests.curvature.nets import build


def main(kinds: list[str]) -> None:
    torch.set_num_threads(1)
    comm = connect()
    found = {}
    for kind in kinds:
        model, loss, sample = build(kind, dtype=torch.float32)
        result = estimate(
            model, loss, sample, comm,
            method="lanczos", samples=22, microbatch=8, tol=1e-3, max_iter=40,
        )  # fmt: skip
        digest = hashlib.sha256(result.vector.numpy().tobytes()).hexdigest()
        value = result.eigenvalue
        mine = (value.value.hex(), value.residual.hex(), value.matvecs, value.converged)
        everyone = comm.gather_objects((*mine, result.sampling_error.hex(), digest))
        found[kind] = {
            "value": value.value,
            "converged": value.converged,
            "same": len(set(everyone)) == 1,
            "vector": result.vector.tolist(),
            "sampling_error": result.sampling_error,
        }
    if comm.rank == 0:
        print(json.dumps({"size": comm.size, "found": found}))
    comm.close()


if __name__ == "__main__":
    main(sys.argv[1:])
