"""`python -m benchmarks.checkpoint FOLDER`: one state, one disk, one run, contenders interleaved.

A model with its momentum is saved by every contender in turn, round by round, to `FOLDER` (give a
folder of the file system that counts: /tmp may be memory). *Durable* is the time from the call
until the files are on disk, without training. *Blocked* is how long the call stops training, and
*slowed* what the steps during the save lose in addition; both in per cent of the time that the save
took. `disk` writes the same bytes with nothing but `write` and `fsync`: no contender can be faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.checkpoint.contenders import CONTENDERS, Contender, Disk, State
from benchmarks.checkpoint.training import Training


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    training = Training(options.model, options.image, options.batch)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="checkpoint-") as scratch:
        contenders = [Disk(), *(make() for make in CONTENDERS)]
        rounds = [
            [
                _measure(each, training, Path(scratch) / f"{r}-{i}")
                for i, each in enumerate(contenders)
            ]
            for r in range(options.rounds + 1)
        ][1:]  # the first one warms up caches and imports
        for each in contenders:
            each.close()
    _report(options, training.state, contenders, rounds)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.checkpoint", description=__doc__)
    parser.add_argument("folder", type=Path, help="where to write; emptied afterwards")
    parser.add_argument("--model", default="resnet18", help="wide_resnet101_2 has 1 GB of state")
    parser.add_argument("--image", type=int, default=64, help="pixels of the training's images")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of the training")
    return parser.parse_args()


Times = dict[str, float]


def _measure(contender: Contender, training: Training, folder: Path) -> Times:
    """Seconds of one save alone, and of one during training."""
    folder.mkdir()
    start = time.perf_counter()
    contender.save(training.state, folder)
    contender.wait()
    durable = time.perf_counter() - start
    _empty(folder)
    if isinstance(contender, Disk):
        return {"durable": durable}
    undisturbed = statistics.median(training.step() for _ in range(3))
    start = time.perf_counter()
    contender.save(training.state, folder)
    blocked = time.perf_counter() - start
    steps = []
    while contender.busy():
        steps.append(training.step())
    contender.wait()
    total = time.perf_counter() - start
    _empty(folder)
    return {
        "durable": durable,
        "blocked": blocked / total,
        "slowed": max(0.0, sum(steps) - undisturbed * len(steps)) / total,
    }


def _empty(folder: Path) -> None:
    """Remove what a save wrote, so that its pages do not slow down the next contender."""
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def _report(
    options: argparse.Namespace,
    state: State,
    contenders: list[Contender],
    rounds: list[list[Times]],
) -> None:
    size = state.nbytes()
    print(f"`python -m benchmarks.checkpoint {' '.join(sys.argv[1:])}`\n")
    print(
        f"{options.model} with momentum, {size / 1e6:.0f} MB; training on {options.threads} "
        f"thread(s); torch {torch.__version__}; medians of {options.rounds} rounds\n"
    )
    print("| | MB/s durable | × hpc_absa's time | blocked | slowed |")
    print("| --- | --- | --- | --- | --- |")
    columns = list(zip(*rounds, strict=True))
    reference = [times["durable"] for times in columns[1]]
    for contender, column in zip(contenders, columns, strict=True):
        durable = [times["durable"] for times in column]
        ratio = statistics.median(d / o for d, o in zip(durable, reference, strict=True))
        shares = ""
        for kind in ("blocked", "slowed"):
            known = [times[kind] for times in column if kind in times]
            shares += f" {statistics.median(known):.1%} |" if known else " |"
        speed = size / statistics.median(durable) / 1e6
        print(f"| {contender.name} | {speed:.0f} | {ratio:.2f} |{shares}")


if __name__ == "__main__":
    main()
