"""The time of a step in `hpc_absa.Run` against the same loop without it, interleaved.

usage: python -m benchmarks.library [--rounds N] [--steps N]

Both loops train their own copy of a model on the same samples, in turns of a few steps. Checkpoints
and evaluation are left out: a turn has steps only.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import hpc_absa as absa
from hpc_absa.models.resnet import resnet as build_resnet

BATCH = 64


def resnet() -> tuple[nn.Module, TensorDataset]:
    """ResNet-8 on random 32×32 images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2048, 3, 32, 32, generator=generator)
    return build_resnet(8, 3, 10), TensorDataset(images, torch.arange(2048) % 10)


def perceptron() -> tuple[nn.Module, TensorDataset]:
    """Three small layers: the fixed cost of a step shows most."""
    inputs = torch.randn(8192, 64, generator=torch.Generator().manual_seed(0))
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers), TensorDataset(inputs, torch.arange(8192) % 10)


def bare_steps(model: nn.Module, dataset: TensorDataset) -> Iterator[None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    sampler = RandomSampler(dataset, num_samples=1 << 30, replacement=True)
    for inputs, targets in DataLoader(dataset, BATCH, sampler=sampler):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
        yield


def run_steps(model: nn.Module, dataset: TensorDataset, folder: str) -> Iterator[None]:
    with absa.Run(
        folder,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        schedule=absa.FB(base_batch=BATCH),
        epochs=1_000_000,
        microbatch=BATCH,
        dataset=dataset,
    ) as run:
        for step in run:
            for inputs, targets in step.batches:
                step.backward(nn.functional.cross_entropy(model(inputs), targets))
            step.optimize()
            yield


def seconds(steps: Iterator[None], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        next(steps)
    return (time.perf_counter() - begin) / count


def compare(
    make: Callable[[], tuple[nn.Module, TensorDataset]], rounds: int, count: int
) -> tuple[float, float]:
    """Medians over the rounds of the seconds of a step, without and with a run."""
    torch.manual_seed(0)
    model, dataset = make()
    other = make()[0]
    with tempfile.TemporaryDirectory() as folder:
        bare, run = bare_steps(model, dataset), run_steps(other, dataset, folder)
        for steps in (bare, run):
            seconds(steps, count)
        times = [(seconds(bare, count), seconds(run, count)) for _ in range(rounds)]
        run.close()
    return statistics.median(b for b, _ in times), statistics.median(r for _, r in times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    print("| model | bare | in a run | overhead |\n| --- | --- | --- | --- |")
    for make in (resnet, perceptron):
        bare, run = compare(make, options.rounds, options.steps)
        ratio = run / bare - 1
        print(f"| {make.__name__} | {1e3 * bare:.2f} ms | {1e3 * run:.2f} ms | {ratio:+.1%} |")


if __name__ == "__main__":
    main()
