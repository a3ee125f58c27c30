"""`python -m benchmarks.curvature`: λ and decisions against the peers, on seven networks.

Needs `pip install hpc-absa[bench]` for the peers; one that is missing is left out. Each method runs
at several settings. Of those whose value is within 1e-2, and within 1e-4, of the true λ the table
has the cheapest, which is generous to the peers: they do not know their error.

Times are CPU time of the process (on a GPU: elapsed time), the fastest of interleaved rounds, on
one thread, in gradients of the same samples: forward and backward in evaluation mode as PyTorch
runs them by default. A decision asks whether λ ≤ t, which the peers answer by computing λ.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.curvature import peers
from benchmarks.curvature.networks import PyHessianResNet20, Samples, trained
from benchmarks.curvature.tolerance import reference
from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.estimate import estimate_eigenvalue
from hpc_absa.curvature.operator import HessianOperator, evaluation_mode
from hpc_absa.curvature.pieces import Pieces

TARGETS = (1e-2, 1e-4)
PEERS = ("PyHessian", "eigenthings", "curvlinops")


@dataclass(frozen=True)
class Case:
    """A network, a stage of its training, and a sample."""

    network: str
    steps: int
    samples: int
    microbatch: int
    rounds: int
    tolerances: tuple[float, ...] = (0.1, 1e-2, 1e-3)
    """Of ours; PyHessian also has a smaller one."""
    products: tuple[int, ...] = (3, 4, 6, 8, 10, 15)
    """Of hessian-eigenthings."""
    curvlinops: bool = True
    compiled: bool = False
    """Also a product by `torch.compile`, which takes a minute or two for a ResNet."""

    @property
    def name(self) -> str:
        stage = "PyHessian's weights" if self.steps < 0 else f"{self.steps} steps"
        return f"{self.network}, {stage}, {self.samples} by {self.microbatch}"


CASES = (
    Case("perceptron-5k", 100, 256, 128, 10, compiled=True),
    Case("perceptron", 100, 256, 128, 2, compiled=True),
    Case("perceptron", 1000, 256, 128, 2),
    Case("digits-cnn", 100, 256, 128, 2),
    Case("digits-cnn", 100, 256, 32, 2),
    Case("digits-cnn", 1000, 256, 32, 2),
    Case("encoder", 100, 256, 128, 2, compiled=True),
    Case("encoder", 1000, 256, 128, 2),
    Case("resnet20", 100, 128, 128, 1, (0.1, 1e-2), (4, 8)),
    Case("resnet20-pyhessian", -1, 128, 128, 1, (0.1, 1e-2), (4, 8), curvlinops=False),
    Case("resnet18-cifar", 20, 32, 32, 1, (1e-2,), (6,), curvlinops=False),
)

Work = Callable[[], float]


@dataclass
class Timing:
    seconds: float = float("inf")
    value: float = float("nan")
    problem: str = ""


@dataclass
class Results:
    """Of one case."""

    case: Case
    parameters: int
    truth: float
    timings: dict[tuple[str, str], Timing] = field(default_factory=dict)
    """By method and setting."""

    @property
    def gradient(self) -> float:
        return self.timings["gradient", ""].seconds

    def best(self, method: str, target: float) -> tuple[float, float, str] | None:
        """Gradients, true error and setting of the cheapest one within the target."""
        found = [
            (timing.seconds / self.gradient, abs(timing.value / self.truth - 1), setting)
            for (name, setting), timing in self.timings.items()
            if name == method and not timing.problem
        ]
        return min((f for f in found if f[1] <= target), default=None)


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    begin = time.perf_counter()
    results = []
    for case in CASES:
        if options.networks and case.network not in options.networks:
            continue
        if options.samples:
            case = replace(case, samples=options.samples, microbatch=128)
        if options.rounds:
            case = replace(case, rounds=options.rounds)
        results.append(_run(case, options))
        passed = time.perf_counter() - begin
        print(f"{passed:.0f} s: {case.name}", file=sys.stderr, flush=True)
        text = "\n".join(_report(results, options))
        if options.out:  # also if a later case is interrupted
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(text + "\n")
    print(text)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curvature", description=__doc__)
    parser.add_argument("data", nargs="?", type=Path, help="packed CIFAR-10, for the ResNets")
    parser.add_argument("--weights", type=Path, help="PyHessian's ResNet-20, as .npz")
    parser.add_argument("--networks", nargs="+", help="only these")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--samples", type=int, help="instead of each case's own, by 128")
    parser.add_argument("--rounds", type=int, help="instead of each case's own")
    parser.add_argument("--out", type=Path, help="also write the tables there")
    return parser.parse_args()


def _run(case: Case, options: argparse.Namespace) -> Results:
    model, pool = trained(
        case.network, options.data, steps=max(case.steps, 0), device=options.device
    )
    if case.steps < 0 and options.weights is not None:
        assert isinstance(model, PyHessianResNet20)
        model.load(options.weights)
    generator = torch.Generator().manual_seed(7)
    chosen = torch.randperm(pool.size, generator=generator)[: case.samples]
    sample = pool.chosen(chosen.to(options.device))
    size = sum(p.numel() for p in model.parameters())
    results = Results(case, size, reference(model, sample, 1e-5))
    works = _works(case, model, sample, results.truth, options)
    for round_ in range(-1, case.rounds):
        for key, work in works.items():
            timing = results.timings.setdefault(key, Timing())
            if timing.problem or (round_ < 0 and key[0] != "product"):
                continue  # a product is made, and compiled, before the first round
            try:
                seconds, timing.value = _clock(work, options.device)
                if round_ >= 0:
                    timing.seconds = min(timing.seconds, seconds)
            except Exception as error:
                timing.problem = type(error).__name__
                print(f"{case.name}: {' '.join(key)}: {error}", file=sys.stderr)
    return results


def _clock(work: Work, device: str) -> tuple[float, float]:
    if device == "cpu":
        begin = time.process_time()
        value = work()
        return time.process_time() - begin, value
    torch.cuda.synchronize()
    begin = time.perf_counter()
    value = work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin, value


def _works(
    case: Case, model: nn.Module, sample: Samples, truth: float, options: argparse.Namespace
) -> dict[tuple[str, str], Work]:
    ours = partial(_ours, model, sample, case.microbatch)
    works: dict[tuple[str, str], Work] = {
        ("gradient", ""): partial(gradient, model, sample),
        ("product", "ours"): _product(model, sample, case.microbatch),
        **{("ours", f"tol {tol:g}"): partial(ours, tol=tol) for tol in case.tolerances},
        **{
            ("decision", f"λ = {ratio:g} t"): partial(ours, tol=1e-2, threshold=truth / ratio)
            for ratio in (4.0, 2.0, 1.25, 0.25)
        },
    }
    if options.no_peers:
        return works
    for tol in (*case.tolerances, case.tolerances[-1] / 10):
        works["PyHessian", f"tol {tol:g}"] = partial(peers.pyhessian, model, sample, tol)
    for count in case.products:
        works["eigenthings", f"{count} products"] = partial(peers.eigenthings, model, sample, count)
    if case.curvlinops:
        if len(case.products) > 2:
            works["curvlinops", "tol 0.01"] = partial(peers.curvlinops, model, sample, 1e-2)
        works["curvlinops", "tol 0.01, basis 6"] = partial(peers.curvlinops, model, sample, 1e-2, 6)
        works["product", "curvlinops"] = _multiplied(peers.curvlinops_product, model, sample, False)
        if case.compiled:
            product = _multiplied(peers.curvlinops_product, model, sample, True)
            works["product", "curvlinops, compiled"] = product
    return works


def gradient(model: nn.Module, sample: Samples) -> float:
    for start in range(0, sample.size, 128):
        inputs, targets = sample.load(start, start + 128)
        loss = functional.cross_entropy(model(inputs), targets)
        torch.autograd.grad(loss, list(model.parameters()))
    return 0.0


def _product(model: nn.Module, sample: Samples, microbatch: int) -> Work:
    with evaluation_mode(model):
        operator = HessianOperator(
            model, functional.cross_entropy, sample, SerialCommunicator(),
            samples=sample.size, keep_graphs=sample.size,
            microbatch=Pieces.of(model, sample, sample.size, microbatch, None, 1).whole,
        )  # fmt: skip
        vector = operator.gradient()
        operator.matvec(vector)
    return lambda: float(operator.matvec(vector)[0])


def _multiplied(
    make: Callable[..., Callable[[Tensor], Tensor]], model: nn.Module, *arguments: object
) -> Work:
    """A product; what multiplies is made with the first one."""
    made: list[Callable[[Tensor], Tensor]] = []
    parameters = list(model.parameters())
    vector = torch.cat([p.detach().reshape(-1) for p in parameters])

    def work() -> float:
        if not made:
            made.append(make(model, *arguments))
        return float(made[0](vector)[0])

    return work


def _ours(
    model: nn.Module,
    sample: Samples,
    microbatch: int,
    *,
    tol: float,
    threshold: float | None = None,
) -> float:
    return estimate_eigenvalue(
        model, functional.cross_entropy, sample, SerialCommunicator(), method="lanczos",
        samples=sample.size, microbatch=microbatch, tol=tol, max_iter=30,
        keep_samples=sample.size, threshold=threshold,
    ).eigenvalue.value  # fmt: skip


def _report(results: list[Results], options: argparse.Namespace) -> list[str]:
    lines = [
        f"`python -m benchmarks.curvature {' '.join(sys.argv[1:])}`",
        "",
        f"{platform.processor() or platform.machine()}, {options.device}, torch "
        f"{torch.__version__}, one thread. λ in gradients (true relative error, setting); the last "
        "column is the fastest peer's cost in ours.",
    ]
    for target in TARGETS:
        lines += ["", f"True error at most {target:g}:", ""]
        lines.append(f"| network, training, samples | ours | {' | '.join(PEERS)} | best peer |")
        lines.append("| --- " * (3 + len(PEERS)) + "|")
        for result in results:
            own = result.best("ours", target)
            rivals = [result.best(peer, target) for peer in PEERS]
            cells = [_cell(cell) for cell in (own, *rivals)]
            fastest = min((r[0] for r in rivals if r), default=None)
            ratio = f"{fastest / own[0]:.1f} ×" if own and fastest else "–"
            lines.append(f"| {result.case.name} | {' | '.join(cells)} | {ratio} |")
    settings = [s for n, s in results[0].timings if n == "decision"] if results else []
    lines += ["", "A decision, in gradients; λ to 1e-2 by the fastest peer beside it:", ""]
    lines.append(f"| network, training, samples | {' | '.join(settings)} | fastest peer |")
    lines.append("| --- " * (2 + len(settings)) + "|")
    for result in results:
        costs = [f"{result.timings['decision', s].seconds / result.gradient:.1f}" for s in settings]
        peers_best = [b[0] for p in PEERS if (b := result.best(p, 1e-2))]
        fastest_text = f"{min(peers_best):.1f}" if peers_best else "–"
        lines.append(f"| {result.case.name} | {' | '.join(costs)} | {fastest_text} |")
    products = ["ours", "curvlinops", "curvlinops, compiled"]
    lines += ["", "One product (ours on kept graphs), in gradients:", ""]
    lines.append(f"| network, training, samples | gradient, ms | {' | '.join(products)} |")
    lines.append("| --- " * (2 + len(products)) + "|")
    for result in results:
        costs = []
        for name in products:
            timing = result.timings.get(("product", name))
            bad = timing is None or timing.problem
            costs.append("–" if bad else f"{timing.seconds / result.gradient:.2f}")
        lines.append(f"| {result.case.name} | {1e3 * result.gradient:.2f} | {' | '.join(costs)} |")
    return lines


def _cell(found: tuple[float, float, str] | None) -> str:
    return "–" if found is None else f"{found[0]:.1f} ({found[1]:.0e}, {found[2]})"


if __name__ == "__main__":
    main()
