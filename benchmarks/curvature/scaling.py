"""Strong scaling of the estimate: `mpirun -np N python -m benchmarks.curvature.scaling DATA`.

The same estimate on the same images over N ranks of one thread each: wall time, the fastest of the
rounds, and λ, which must not depend on N. For comparison the gradient of the same images, split
over the ranks without communication, which shows how far the machine itself scales.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn import functional

from benchmarks.curvature.__main__ import gradient
from benchmarks.curvature.networks import Samples, trained
from hpc_absa.comm import Communicator, connect
from hpc_absa.curvature.estimate import estimate_eigenvalue

T = TypeVar("T")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="images packed by `hpc-absa data` (CIFAR-10)")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="of training before, on rank 0")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    comm = connect()
    model, pool = trained(options.model, options.data, steps=options.steps)
    images = pool.chosen(torch.arange(options.images))
    for tensor in model.state_dict().values():
        comm.broadcast_(tensor.contiguous())
    own = len(images.inputs) // comm.size
    share = Samples(images.inputs[:own], images.targets[:own])
    estimate = partial(
        estimate_eigenvalue, model, functional.cross_entropy, images, comm,
        method="lanczos", samples=options.images, microbatch=64, tol=1e-3, max_iter=20,
    )  # fmt: skip
    seconds, gradients = [], []
    for _ in range(options.rounds):
        gradients.append(_together(comm, partial(gradient, model, share))[0])
        elapsed, result = _together(comm, estimate)
        seconds.append(elapsed)
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=torch.float64)
    comm.allreduce_(total)
    begin = time.perf_counter()
    for _ in range(20):
        comm.allreduce_(total)
    reduction = (time.perf_counter() - begin) / 20
    if comm.rank == 0:
        value = result.eigenvalue
        print(
            f"{comm.size} ranks: gradient {min(gradients):.2f} s, λ {min(seconds):.2f} s", end=" "
        )
        print(f"(of {', '.join(f'{s:.2f}' for s in sorted(seconds))})", end="; ")
        print(f"{value.value!r}, {value.matvecs} products; the ranks' sum of one, ", end="")
        print(f"{8 * total.numel() / 1e6:.2g} MB, takes {1e3 * reduction:.2g} ms")
    comm.close()


def _together(comm: Communicator, work: Callable[[], T]) -> tuple[float, T]:
    """Wall seconds until the slowest rank has finished, and this rank's result."""
    comm.allgather_object(None)
    begin = time.perf_counter()
    result = work()
    return max(comm.allgather_object(time.perf_counter() - begin)), result


if __name__ == "__main__":
    main()
