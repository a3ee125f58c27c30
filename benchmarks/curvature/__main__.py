"""`python -m benchmarks.curvature`: same model, images and tolerance, one run, interleaved.

Needs `pip install hpc-absa[bench]` for the peers; one that is missing is left out. Times are CPU
time of the process (all threads), so that other load on the machine matters less; the fastest of
the rounds counts. One "gradient" is forward and backward in evaluation mode as PyTorch runs it by
default (contiguous images, batches of 128). Rows with a question mark measure what a decision
needs, whether λ is above a threshold t, and stop as soon as that is known.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Callable
from functools import partial

import h5py
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpc_absa import models
from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.estimate import estimate_eigenvalue
from hpc_absa.curvature.operator import HessianOperator, evaluation_mode


class Images:
    """A Hessian sample in memory."""

    def __init__(self, inputs: Tensor, targets: Tensor) -> None:
        self.inputs, self.targets, self.size = inputs, targets, len(inputs)

    def load(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.inputs[start:stop], self.targets[start:stop]


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    model, images = trained(options)
    reference = _ours(model, images, tol=1e-7, microbatch=options.microbatch, max_iter=60)[0]
    contenders: dict[str, Callable[[], tuple[float, str]]] = {}
    for tol in (1e-2, 1e-3):
        ours = partial(_ours, model, images, tol=tol, microbatch=options.microbatch, max_iter=20)
        contenders[f"hpc_absa {tol:g}"] = ours
        if not options.no_peers:
            contenders[f"PyHessian {tol:g}"] = partial(_pyhessian, model, images, tol)
        if not (options.no_curvlinops or options.no_peers):
            contenders[f"curvlinops+eigsh {tol:g}"] = partial(_curvlinops, model, images, tol)
    for what, share in (("λ > 2 t", 0.5), ("λ > 1.25 t", 0.8), ("λ < t/2", 2.0)):
        contenders[f"hpc_absa, {what}? 0.01"] = partial(
            _ours, model, images, tol=1e-2, microbatch=options.microbatch, max_iter=20,
            threshold=share * reference,
        )  # fmt: skip
    product = _product(model, images, options.microbatch)
    times: dict[str, list[float]] = {name: [] for name in ["gradient", "product", *contenders]}
    answers: dict[str, tuple[float, str]] = {}
    for _ in range(options.rounds):
        times["gradient"].append(_clock(partial(gradient, model, images))[0])
        times["product"].append(_clock(product)[0])
        for name, contender in contenders.items():
            try:
                seconds, answers[name] = _clock(contender)
            except ImportError as missing:
                print(f"{name}: left out, {missing}", file=sys.stderr)
                continue
            times[name].append(seconds)
    _report(options, reference, times, answers)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curvature", description=__doc__)
    parser.add_argument("data", help="images packed by `hpc-absa data` (CIFAR-10)")
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--microbatch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=100, help="of training before")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-curvlinops", action="store_true", help="leave out the slowest")
    parser.add_argument("--no-peers", action="store_true", help="leave out both")
    return parser.parse_args()


def trained(options: argparse.Namespace) -> tuple[nn.Module, Images]:
    """A briefly trained model, and the images to take the Hessian on."""
    torch.manual_seed(0)
    with h5py.File(options.data) as file:
        inputs = torch.from_numpy(file["train/images"][:20480])
        targets = torch.from_numpy(file["train/labels"][:20480]).long()
    if inputs.shape[-1] in (1, 3):
        inputs = inputs.permute(0, 3, 1, 2)
    order = torch.randperm(len(inputs))
    classes = int(targets.max()) + 1
    model = models.build(options.model, {}, inputs.shape[1], inputs.shape[2], classes)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(options.steps):
        chosen = order[torch.arange(step * 128, step * 128 + 128) % len(order)]
        optimizer.zero_grad()
        functional.cross_entropy(model(_normal(inputs[chosen])), targets[chosen]).backward()
        optimizer.step()
    model.zero_grad()
    chosen = order[: options.images]
    return model.eval(), Images(_normal(inputs[chosen]).contiguous(), targets[chosen])


def _normal(images: Tensor) -> Tensor:
    return (images.float() / 255 - 0.47) / 0.25


def _clock(work: Callable[[], tuple[float, str]]) -> tuple[float, tuple[float, str]]:
    begin = time.process_time()
    answer = work()
    return time.process_time() - begin, answer


def gradient(model: nn.Module, images: Images) -> tuple[float, str]:
    for start in range(0, images.size, 128):
        inputs, targets = images.load(start, start + 128)
        loss = functional.cross_entropy(model(inputs), targets)
        torch.autograd.grad(loss, list(model.parameters()))
    return 0.0, ""


def _product(model: nn.Module, images: Images, microbatch: int) -> Callable[[], tuple[float, str]]:
    with evaluation_mode(model):
        operator = HessianOperator(
            model, functional.cross_entropy, images, SerialCommunicator(),
            samples=images.size, microbatch=microbatch, keep_graphs=images.size,
        )  # fmt: skip
        vector = operator.gradient()
        operator.matvec(vector)
    return lambda: (float(operator.matvec(vector)[0]), "")


def _ours(
    model: nn.Module,
    images: Images,
    *,
    tol: float,
    microbatch: int,
    max_iter: int,
    threshold: float | None = None,
) -> tuple[float, str]:
    result = estimate_eigenvalue(
        model, functional.cross_entropy, images, SerialCommunicator(), method="lanczos",
        samples=images.size, microbatch=microbatch, tol=tol, max_iter=max_iter,
        keep_samples=images.size, threshold=threshold,
    )  # fmt: skip
    value = result.eigenvalue
    note = f"{value.matvecs} products of {value.samples} images"
    if threshold is not None:
        note = f"{'above' if value.stopped_above_threshold else 'not above'}: {note}"
    return value.value, f"{note} + {result.coarse_matvecs} of an eighth"


def _pyhessian(model: nn.Module, images: Images, tol: float) -> tuple[float, str]:
    from pyhessian import hessian

    data = (images.inputs, images.targets)
    peer = hessian(model, functional.cross_entropy, data=data, cuda=False)
    values, _ = peer.eigenvalues(maxIter=100, tol=tol, top_n=1)
    model.zero_grad(set_to_none=True)
    return float(values[0]), ""


def _curvlinops(model: nn.Module, images: Images, tol: float) -> tuple[float, str]:
    from curvlinops import HessianLinearOperator
    from scipy.sparse.linalg import eigsh

    data = [images.load(start, start + 128) for start in range(0, images.size, 128)]
    parameters = list(model.parameters())
    operator = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), parameters, data, check_deterministic=False
    ).to_scipy()
    values = eigsh(operator, k=1, which="LA", tol=tol, return_eigenvectors=False)
    return float(np.max(values)), ""


def _report(
    options: argparse.Namespace,
    reference: float,
    times: dict[str, list[float]],
    answers: dict[str, tuple[float, str]],
) -> None:
    best = {name: min(seconds) for name, seconds in times.items() if seconds}
    unit = best["gradient"]
    print(f"`python -m benchmarks.curvature {' '.join(sys.argv[1:])}`\n")
    print(f"{options.model}, {options.images} images, {options.threads} thread(s),", end=" ")
    print(
        f"{platform.processor() or platform.machine()}, torch {torch.__version__}; λ {reference}\n"
    )
    print("| | CPU s | gradients | relative error | × hpc_absa | |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, seconds in best.items():
        error = ratio = note = ""
        if name in answers:
            value, note = answers[name]
            error = f"{abs(value / reference - 1):.1e}"
            ratio = f"{seconds / best['hpc_absa ' + name.split()[-1]]:.1f}"
        print(f"| {name} | {seconds:.2f} | {seconds / unit:.2f} | {error} | {ratio} | {note} |")


if __name__ == "__main__":
    main()
