"""The predictions of `hpc-absa plan --scale` against runs that its constants do not come from.

usage: python -m benchmarks.scale [--rounds N] [--epochs N]

Each round measures the constants in a run of ABSA on digits that grows from one rank to two, and
predicts other runs: two ranks with a fixed batch, GG from one rank to two, and four ranks, which on
two cores is more than the model describes: ranks then wait in each allreduce for others that wait
for a core.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from benchmarks import results
from benchmarks.results import Comparison, Measure
from hpc_absa import config, scale
from hpc_absa.plan import plan, training_samples
from hpc_absa.report.history import load

JOB = results.ROOT / "jobs/digits.toml"
RUNS = {
    "two ranks, fixed batch": ("schedule.method=bl", "ranks.initial=2", "ranks.max=2"),
    "GG from one rank to two": ("schedule.method=gg", "ranks.max=2"),
    "four ranks, fixed batch": ("schedule.method=bl", "ranks.initial=4"),
}
PARTS = {"computing": scale.COMPUTING, "comm": ("comm",), "start": scale.STARTING}
SECONDS = {name: Measure("s") for name in (*PARTS, "wall")} | {"error": Measure("% of wall")}


def run(folder: Path, settings: tuple[str, ...]) -> None:
    options = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "hpc_absa", "run", str(JOB), "--run-dir", str(folder)]
    subprocess.run([*command, *options], check=True, cwd=results.ROOT, stdout=subprocess.DEVNULL)


def numbers(seconds: Mapping[str, float], wall: float) -> dict[str, float]:
    parts = {k: sum(seconds.get(key, 0.0) for key in keys) for k, keys in PARTS.items()}
    return {**parts, "wall": wall}


def main() -> None:
    parser = results.options(__doc__)
    parser.add_argument("--epochs", type=int, help="of each run; default 120")
    options = parser.parse_args()
    epochs = options.epochs or (30 if options.quick else 120)
    rounds = 1 if options.quick else options.rounds
    common = (f"train.epochs={epochs}", f"train.milestones=[{epochs // 2}, {epochs * 3 // 4}]")
    tables = {name: Comparison(name, SECONDS, "measured") for name in RUNS}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            run(folder / "fit", (*common, "ranks.max=2"))
            for name, settings in RUNS.items():
                job = config.load(JOB, (*common, *settings))
                machine = constants(folder / "fit", job)
                samples = training_samples(job)
                most = job.ranks.max or 4
                planned = plan(job, samples, most)["plan"]
                predicted = scale.predict(planned, job, samples, machine)
                run(folder / name, (*common, *settings))
                measured = load(folder / name)
                tables[name].add("measured", numbers(measured.seconds, measured.wall))
                error = 100 * (3600 * predicted.hours / measured.wall - 1)
                row = numbers(predicted.seconds, 3600 * predicted.hours) | {"error": error}
                tables[name].add("predicted", row)
                print(f"round {number}: {name}: {error:+.1f} %", file=sys.stderr, flush=True)
    results.write("scale", list(tables.values()), options)


def constants(folder: Path, job: config.Job) -> scale.Machine:
    """Of the run in `folder`, on this machine as one node."""
    from hpc_absa.training.named import require_buildable

    parameters = require_buildable(job)
    assert parameters
    cores = len(os.sched_getaffinity(0))
    stated = {"parameters": parameters, "ranks_per_node": 4, "slots_per_node": cores}
    return scale.Machine.model_validate(scale.measured(folder, job, parameters) | stated)


if __name__ == "__main__":
    main()
