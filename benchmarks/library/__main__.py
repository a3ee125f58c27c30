"""The time of a step in `hpc_absa.Run` against the same loop without it, interleaved.

usage: python -m benchmarks.library [--quick] [--rounds N]

Both loops train their own copy of a model on the same samples, in turns of a few steps. Checkpoints
and evaluation are left out: a turn has steps only, and an epoch is longer than all turns.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import hpc_absa as absa
from benchmarks import results
from hpc_absa.models.resnet import resnet as build_resnet

BATCH = 64
BARE = "the loop alone"


def resnet() -> tuple[nn.Module, TensorDataset]:
    """ResNet-8 on random 32×32 images."""
    images = torch.randn(16384, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return build_resnet(8, 3, 10), TensorDataset(images, torch.arange(len(images)) % 10)


def perceptron() -> tuple[nn.Module, TensorDataset]:
    """Three small layers: the fixed cost of a step shows most."""
    inputs = torch.randn(262144, 64, generator=torch.Generator().manual_seed(0))
    layers = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers), TensorDataset(inputs, torch.arange(len(inputs)) % 10)


MODELS = {"ResNet-8": (resnet, 10), "perceptron": (perceptron, 500)}
"""By name, with the steps of a turn."""


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def bare_steps(model: nn.Module, dataset: TensorDataset, by_index: bool) -> Iterator[None]:
    optimizer, (inputs, targets) = sgd(model), dataset.tensors

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while by_index:
            for rows in torch.randperm(len(dataset)).split(BATCH):
                yield inputs[rows], targets[rows]
        sampler = RandomSampler(dataset, num_samples=1 << 30, replacement=True)
        yield from DataLoader(dataset, BATCH, sampler=sampler)

    for batch, labels in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), labels).backward()
        optimizer.step()
        yield


def run_steps(
    model: nn.Module, dataset: TensorDataset, by_index: bool, folder: str
) -> Iterator[None]:
    inputs, targets = dataset.tensors
    with absa.Run(
        folder,
        model=model,
        optimizer=sgd(model),
        schedule=absa.FB(base_batch=BATCH),
        epochs=1_000_000,
        microbatch=BATCH,
        dataset=None if by_index else dataset,
        samples=len(dataset) if by_index else None,
    ) as run:
        for step in run:
            if by_index:
                for indices in step.microbatches:
                    rows = torch.from_numpy(np.array(indices))
                    outputs = model(inputs[rows])
                    step.backward(nn.functional.cross_entropy(outputs, targets[rows]))
            else:
                for batch, labels in step.batches:
                    step.backward(nn.functional.cross_entropy(model(batch), labels))
            step.optimize()
            yield


def turn(steps: Iterator[None], count: int) -> Callable[[], results.Numbers]:
    def measure() -> results.Numbers:
        begin, cpu = time.perf_counter(), time.process_time()
        for _ in range(count):
            next(steps)
        seconds = time.perf_counter() - begin, time.process_time() - cpu
        return {"step": 1e3 * seconds[0] / count, "CPU": 1e3 * seconds[1] / count}

    return measure


def compare(name: str, by_index: bool, rounds: int) -> results.Comparison:
    make, count = MODELS[name]
    data = "samples by index" if by_index else "a data set"
    measures = {"step": results.Measure("ms", "lower"), "CPU": results.Measure("ms", "lower")}
    table = results.Comparison(f"{name}, batch {BATCH}, {data}", measures, BARE)
    torch.manual_seed(0)
    model, dataset = make()
    other = make()[0]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        bare = bare_steps(model, dataset, by_index)
        run = run_steps(other, dataset, by_index, folder)
        stack.callback(run.close)
        table.run({BARE: turn(bare, count), "in a Run": turn(run, count)}, rounds)
    return table


def main() -> None:
    options = results.options(__doc__).parse_args()
    rounds = 3 if options.quick else max(options.rounds, 21)
    tables = [compare(name, by_index, rounds) for name in MODELS for by_index in (False, True)]
    results.write("library", tables, options)


if __name__ == "__main__":
    main()
