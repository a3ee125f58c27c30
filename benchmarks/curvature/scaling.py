"""Strong scaling of the estimate: `mpirun -np N python -m benchmarks.curvature.scaling DATA`.

The same estimate on the same images over N ranks of one thread each; wall time, the fastest of the
rounds, and λ, which must not depend on N.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch.nn import functional

from benchmarks.curvature.__main__ import trained
from hpc_absa.comm import connect
from hpc_absa.curvature import probe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", help="images packed by `hpc-absa data` (CIFAR-10)")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="of training before, on rank 0")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    comm = connect()
    model, images = trained(options)
    for tensor in model.state_dict().values():
        comm.broadcast_(tensor.contiguous())
    seconds = []
    for _ in range(options.rounds):
        comm.gather_objects(None)
        begin = time.perf_counter()
        found = probe.estimate(
            model, functional.cross_entropy, images, comm,
            method="lanczos", samples=options.images, microbatch=64, tol=1e-3, max_iter=20,
        ).eigenvalue  # fmt: skip
        seconds.append(time.perf_counter() - begin)
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    comm.sum_(total)
    begin = time.perf_counter()
    for _ in range(20):
        comm.sum_(total)
    reduction = (time.perf_counter() - begin) / 20
    if comm.rank == 0:
        print(
            f"{comm.size} ranks: {min(seconds):.2f} s of {sorted(round(s, 2) for s in seconds)}, "
            f"λ {found.value!r}, {found.matvecs} products; a product's sum over the ranks "
            f"({8 * total.numel() / 1e6:.2g} MB) takes {1e3 * reduction:.2g} ms"
        )
    comm.close()


if __name__ == "__main__":
    main()
