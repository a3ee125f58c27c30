"""How often is a converged eigenvalue outside its tolerance, and what does the proof cost?

`python -m benchmarks.curvature.tolerance NETWORK...`: estimates at six tolerances on networks at
several stages of training, each on a random sample, against λ of that sample to 1e-6 from a random
start.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from benchmarks.curvature.memo import memoized_products
from benchmarks.curvature.networks import NETWORKS, Samples, trained
from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature import eigen
from hpc_absa.curvature.estimate import estimate_eigenvalue
from hpc_absa.curvature.operator import HessianOperator, evaluation_mode

TOLERANCES = (0.1, 0.05, 0.02, 1e-2, 1e-3, 1e-4)


@dataclass
class Count:
    estimates: int = 0
    converged: int = 0
    outside: int = 0
    products: int = 0
    within_10: int = 0
    within_15: int = 0
    within_20: int = 0

    def add(self, value: float, converged: bool, products: int, truth: float, tol: float) -> None:
        self.estimates += 1
        if not converged:
            return
        self.converged += 1
        self.products += products
        self.outside += value < truth - max(tol, 1e-5) * abs(value)
        self.within_10 += products <= 10
        self.within_15 += products <= 15
        self.within_20 += products <= 20


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curvature.tolerance")
    parser.add_argument("networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--data", type=Path, help="packed CIFAR-10, for the ResNets")
    parser.add_argument("--steps", type=int, nargs="+", default=[0, 30, 100, 300])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--repeats", type=int, default=1, help="samples for each of these")
    parser.add_argument("--max-iter", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    print("| network, steps | tol | estimates | converged | outside | products | ≤ 10, 15, 20 |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name in options.networks:
        for steps in options.steps:
            counts: dict[float, Count] = defaultdict(Count)
            for seed in options.seeds:
                model, pool = trained(
                    name, options.data, steps=steps, seed=seed, device=options.device
                )
                for number in range(options.repeats):
                    for samples in options.samples:
                        if time.perf_counter() - begin > options.seconds:
                            break
                        generator = torch.Generator().manual_seed(1000 * seed + number)
                        chosen = torch.randint(0, pool.size, (samples,), generator=generator)
                        sample = pool.chosen(chosen.to(pool.inputs.device))
                        measure(model, sample, options.max_iter, counts)
            for tol, c in counts.items():
                mean = c.products / max(1, c.converged)
                within = f"{c.within_10}, {c.within_15}, {c.within_20}"
                print(
                    f"| {name}, {steps} | {tol:g} | {c.estimates} | {c.converged} | {c.outside} | "
                    f"{mean:.1f} | {within} |",
                    flush=True,
                )


def measure(model: nn.Module, sample: Samples, max_iter: int, counts: dict[float, Count]) -> None:
    truth = reference(model, sample)
    with memoized_products():
        for tol in TOLERANCES:
            value = estimate_eigenvalue(
                model, functional.cross_entropy, sample, SerialCommunicator(), method="lanczos",
                samples=sample.size, microbatch=128, tol=tol, max_iter=max_iter,
                keep_samples=sample.size,
            ).eigenvalue  # fmt: skip
            counts[tol].add(value.value, value.converged, value.matvecs, truth, tol)


def reference(model: nn.Module, sample: Samples, tol: float = 1e-5) -> float:
    """λ from a random start, which makes no assumption about the network."""
    with evaluation_mode(model):
        operator = HessianOperator(
            model, functional.cross_entropy, sample, SerialCommunicator(), samples=sample.size,
            microbatch=64, keep_graphs=sample.size,
        )  # fmt: skip
        start = eigen.randomized(operator.gradient(), 1.0, seed=99)
        result = eigen.lanczos(operator.matvec, start, tol=tol, max_iter=80)
        operator.close()
    return result.top.value


if __name__ == "__main__":
    main()
