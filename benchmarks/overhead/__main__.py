"""Shares of communication, resizing and the Hessian in a run, beside those of the talk.

usage: python -m benchmarks.overhead [--data DIR | --run DIR]

Shares are of the time in the talk's four columns: computing (adversarial examples included),
communicating, resizing, Hessian. By default ResNet-8 is trained on CIFAR-10 with ABSA tuned from
one rank to two, long enough for 30 minutes on two cores; `--run` reads a finished run instead.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks import results
from benchmarks.results import Comparison, Measure
from hpc_absa.errors import UsageError
from hpc_absa.report.history import load
from hpc_absa.report.published import PUBLISHED_TIMES
from hpc_absa.report.tables import schedule_name

JOB = results.ROOT / "jobs/cifar10-resnet8.toml"
SETTINGS = (
    "schedule={method='absa-tuned', base_batch=128, max_batch=4096, beta=4, lr_rule='square-root'}",
    "train.epochs=44",
    "train.milestones=[22, 36]",
    "train.threads_per_rank=1",
    "train.channels_last=true",
    "hessian.every=50000",
)
"""Three growths by 4, as the talk's tuned run seems to have had, from one rank to two."""
TALK = {"comm": "comm", "resize": "resize", "hessian": "Hessian"}
MINUTES = 30


def shares(seconds: Mapping[str, float]) -> dict[str, float]:
    """Percent, and the minutes that they are of."""
    computing = seconds.get("comp", 0.0) + seconds.get("adversarial", 0.0)
    total = computing + sum(seconds.get(key, 0.0) for key in TALK)
    if not computing:
        raise UsageError("the run has no phase that ended normally")
    percent = {title: 100 * seconds.get(key, 0.0) / total for key, title in TALK.items()}
    return percent | {"time": total / 60}


def train(data: Path, folder: Path, *, quick: bool) -> None:
    """A run of ABSA tuned in `folder`."""
    settings = list(SETTINGS)
    if quick:
        settings += ["train.epochs=4", "data.train_samples=5000", "hessian.every=2500"]
        settings += ["train.milestones=[]", "data.test_samples=1000"]
    command = [sys.executable, "-m", "hpc_absa", "run", str(JOB), "--run-dir", str(folder)]
    for setting in [*settings, f"data.root={str(data.resolve())!r}"]:
        command += ["--set", setting]
    subprocess.run(command, check=True, cwd=results.ROOT, stdout=sys.stderr)


def table(run: Path) -> Comparison:
    history = load(run)
    ours = shares(history.seconds)
    name = f"this run ({schedule_name(history.method)})"
    measures = {title: Measure("%", "lower") for title in TALK.values()}
    note = "Shares of computing, communicating, resizing and the Hessian together."
    if ours["time"] < MINUTES:
        note += f" The run is shorter than {MINUTES} minutes, so the share of its resizes is large."
    comparison = Comparison("Overhead", measures | {"time": Measure("min")}, name, note=note)
    comparison.add(name, ours)
    for method in ("absa", "absa-tuned"):
        comparison.add(f"{schedule_name(method)}, talk", shares(PUBLISHED_TIMES[method]))
    return comparison


def main() -> None:
    parser = results.options(__doc__)
    parser.add_argument("--data", type=Path, default=Path("data/cifar10"), help="CIFAR-10")
    parser.add_argument("--run", type=Path, help="a run directory, in place of a new run")
    options = parser.parse_args()
    try:
        if options.run:
            results.write("overhead", [table(options.run)], options)
            return
        with tempfile.TemporaryDirectory() as folder:
            train(options.data, run := Path(folder) / "run", quick=options.quick)
            results.write("overhead", [table(run)], options)
    except UsageError as error:
        sys.exit(f"benchmarks.overhead: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)


if __name__ == "__main__":
    main()
