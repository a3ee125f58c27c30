"""How often is a converged eigenvalue outside its tolerance, and what does the proof cost?

`python -m benchmarks.curvature.tolerance NETWORK...`: estimates at six tolerances on networks at
several stages of training, each on a random sample, against λ of that sample from a random start.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional

from benchmarks.curvature.memo import memoized_products
from benchmarks.curvature.networks import Samples, drawn, parser, stages
from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature import eigen
from hpc_absa.curvature.estimate import estimate_eigenvalue
from hpc_absa.curvature.operator import HessianOperator, evaluation_mode

TOLERANCES = (0.1, 0.05, 0.02, 1e-2, 1e-3, 1e-4)


@dataclass
class Count:
    estimates: int = 0
    outside: int = 0
    products: list[int] = field(default_factory=list)
    """Of converged estimates."""
    gradients: float = 0.0
    """Of all estimates, as samples differentiated."""


def main() -> None:
    arguments = parser(__doc__, steps=[0, 30, 100, 300])
    arguments.add_argument("--samples", type=int, nargs="+", default=[64, 128, 256])
    arguments.add_argument("--repeats", type=int, default=1, help="samples for each of these")
    arguments.add_argument("--max-iter", type=int, default=40)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    counts: dict[tuple[str, float], Count] = defaultdict(Count)
    for name, seed, model, pool, end in stages(options):
        for number in range(options.repeats):
            for samples in options.samples:
                if time.perf_counter() < end:
                    sample = drawn(pool, samples, 1000 * seed + number)
                    measure(name, model, sample, options.max_iter, counts)
    print("| network | tol | estimates | converged | outside | products | ≤ 10, 20 | gradients |")
    print("| --- " * 8 + "|")
    for (name, tol), c in counts.items():
        converged, within = len(c.products), [sum(p <= n for p in c.products) for n in (10, 20)]
        print(
            f"| {name} | {tol:g} | {c.estimates} | {converged} | {c.outside} | "
            f"{sum(c.products) / max(1, converged):.1f} | {within[0]}, {within[1]} | "
            f"{c.gradients / c.estimates:.1f} |"
        )


def measure(
    name: str,
    model: nn.Module,
    sample: Samples,
    max_iter: int,
    counts: dict[tuple[str, float], Count],
) -> None:
    truth = reference(model, sample)
    with memoized_products():
        for tol in TOLERANCES:
            result = estimate_eigenvalue(
                model, functional.cross_entropy, sample, SerialCommunicator(), method="lanczos",
                samples=sample.size, microbatch=128, tol=tol, max_iter=max_iter,
                keep_samples=sample.size,
            )  # fmt: skip
            value, count = result.eigenvalue, counts[name, tol]
            count.estimates += 1
            count.gradients += result.samples_processed / sample.size
            if value.converged:
                count.products.append(value.matvecs)
                count.outside += value.value < truth - max(tol, 1e-5) * abs(value.value)


def reference(model: nn.Module, sample: Samples, tol: float = 1e-5) -> float:
    """λ from a random start, which makes no assumption about the network."""
    with evaluation_mode(model, tol=0.0):  # without TensorFloat-32
        operator = HessianOperator(
            model, functional.cross_entropy, sample, SerialCommunicator(), samples=sample.size,
            microbatch=512 if sample.inputs.is_cuda else 64, keep_graphs=sample.size,
        )  # fmt: skip
        start = eigen.randomized(operator.gradient(), 1.0, seed=99)
        result = eigen.lanczos(operator.matvec, start, tol=tol, max_iter=80)
        operator.close()
    return result.top.value


if __name__ == "__main__":
    main()
