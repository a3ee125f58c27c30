"""Saving and restoring a run's state: this package, torch.save and torch.distributed.checkpoint.

`durable` is the time from the call until the files would survive a power failure, while nothing
else runs. Then the same save is made beside training, on one thread and with a thread on every
core: `blocked` is how long the call stops training, `slowed` what the steps during the save lose in
addition, both as a share of the time until the save is durable; `lost` is the sum of both in
seconds. `write, fsync` writes the same bytes and checks nothing: no contender can be faster.
"""

from __future__ import annotations

import functools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import results
from benchmarks.checkpoint.contenders import CONTENDERS, Contender, Disk
from benchmarks.checkpoint.training import Training
from benchmarks.results import Command, Comparison, Measure, Numbers
from hpc_absa.supervisor.launchers import mpi_environment, program

OURS = "hpc_absa"
SAVED = {"durable": Measure("s", "lower"), "speed": Measure("MB/s")}
BESIDE = {
    f"{what}, {threads}": Measure(unit, "lower" if what == "lost" else "")
    for threads in ("1 thread", "all cores")
    for what, unit in (("blocked", "%"), ("slowed", "%"), ("lost", "s"))
}
RESTORED = {
    "save": Measure("s", "lower"),
    "restore": Measure("s", "lower"),
    "read": Measure("MB"),
}


def main() -> None:
    parser = results.options(__doc__)
    parser.add_argument("--folder", type=Path, default=Path(), help="on the disk to measure")
    options = parser.parse_args()
    small = ("resnet18", 64, 8, 2 if options.quick else 2 * options.rounds)
    large = ("wide_resnet101_2", 32, 2, options.rounds)
    sizes = [small] if options.quick else [small, large]
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="checkpoint-") as scratch:
        tables = [_beside_training(*size, Path(scratch)) for size in sizes]
        tables += [_on_two_ranks(name, rounds, Path(scratch)) for name, _, _, rounds in sizes]
    results.write("checkpoint", tables, options, ["h5py", "isal", "xxhash"])


def _beside_training(model: str, image: int, batch: int, rounds: int, scratch: Path) -> Comparison:
    torch.set_num_threads(1)
    training = Training(model, image, batch)
    size = training.state.nbytes()
    title = f"{model} with momentum, {size / 1e6:,.0f} MB"
    disk = Disk()
    table = Comparison(title, SAVED | BESIDE, OURS, (disk.name,))
    contenders: list[Contender] = [disk, *(make() for make in CONTENDERS)]
    table.run(
        {each.name: functools.partial(_measure, each, training, scratch) for each in contenders},
        rounds,
    )
    return table


def _on_two_ranks(model: str, rounds: int, scratch: Path) -> Comparison:
    words = [program("mpirun"), "--oversubscribe", "--bind-to", "none", "-np", "2"]
    words += [sys.executable, "-m", "benchmarks.checkpoint.ranks", model, str(scratch)]
    note = "After the save the files are dropped from the page cache, so that the disk is read."
    table = Comparison(f"{model}, saved and restored by two ranks", RESTORED, OURS, note=note)
    kinds = {OURS: "hpc_absa", "torch.save, torch.load and broadcast": "torch", "DCP": "dcp"}
    environment = {**mpi_environment(), "OMP_NUM_THREADS": "1"}
    table.run({n: Command([*words, kind], environment) for n, kind in kinds.items()}, rounds)
    return table


def _measure(contender: Contender, training: Training, scratch: Path) -> Numbers:
    """One save alone, and one beside training on each number of threads."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        start = time.perf_counter()
        contender.save(training.state, Path(folder))
        contender.wait()
        durable = time.perf_counter() - start
    numbers = {"durable": durable, "speed": training.state.nbytes() / durable / 1e6}
    if isinstance(contender, Disk):
        return numbers
    for name, threads in (("1 thread", 1), ("all cores", os.cpu_count() or 1)):
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            times = _save_beside(contender, training, Path(folder))
        numbers |= {f"{what}, {name}": value for what, value in times.items()}
    torch.set_num_threads(1)
    return numbers


def _save_beside(contender: Contender, training: Training, folder: Path) -> dict[str, float]:
    before = [training.step() for _ in range(3)]
    start = time.perf_counter()
    contender.save(training.state, folder)
    blocked = time.perf_counter() - start
    steps = []
    while contender.busy():
        steps.append(training.step())
    contender.wait()
    total = time.perf_counter() - start
    undisturbed = statistics.median(before + [training.step() for _ in range(3)])
    lost = sum(steps) - undisturbed * len(steps)
    return {
        "blocked": 100 * blocked / total,
        "slowed": 100 * lost / total,
        "lost": blocked + lost,
    }


if __name__ == "__main__":
    main()
