"""From a decision to the first step of the next phase, as a ratio to a bare start of those ranks.

    python -m benchmarks.startup [--launcher mpirun|horovodrun|slurm] [--resizes 10] [--ranks 2]

A resize is timed by the run itself: from the `phase_end` of the phase whose decision asked for more
ranks, to the end of the first step of the next one (event `resize`). The bare start is `mpirun` of
the imports, `hvd.init()` and one allreduce, from the launch to the allreduce's end. The two
alternate, so that a slow machine affects both. `slurm` starts a four-node Slurm, as the tests do;
its bare start is mpirun's, so that its ratio shows what Slurm adds. Bytecode is kept, as for any
installed package (PYTHONDONTWRITEBYTECODE is removed).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hpc_absa.rundir.events import EventLog
from hpc_absa.supervisor.launchers import mpi_environment, program

BARE = """
import time, torch, horovod.torch as hvd
from mpi4py import MPI
hvd.init()
hvd.allreduce(torch.ones(1))
if hvd.rank() == 0:
    print(time.time(), flush=True)
"""

JOB = """
name = "startup"
[data]
name = "digits"
[model]
name = "digits-cnn"
[train]
epochs = 2
microbatch = 32
lr = 0.05
threads_per_rank = 1
[schedule]
method = "absa"
base_batch = 32
max_batch = {batch}
beta = {ranks}
kappa = 1
[hessian]
samples = 128
[ranks]
initial = 1
max = {ranks}
[launch]
launcher = "{launcher}"
ranks_per_node = 1
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--launcher", choices=["mpirun", "horovodrun", "slurm"], default="mpirun")
    parser.add_argument("--resizes", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    bare, resizes = [], []
    with tempfile.TemporaryDirectory() as folder, surroundings(options.launcher) as environment:
        job = Path(folder) / "job.toml"
        job.write_text(
            JOB.format(batch=32 * options.ranks, ranks=options.ranks, launcher=options.launcher)
        )
        for n in range(options.resizes):
            bare.append(bare_start(options.ranks))
            resizes.append(resize(job, Path(folder) / str(n), environment))
            print(f"{n + 1}: bare {bare[-1]:.2f} s, resize {resizes[-1]:.2f} s", flush=True)
    print(
        json.dumps(
            {
                "launcher": options.launcher,
                "ranks": [1, options.ranks],
                "resizes": len(resizes),
                "bare_median": round(statistics.median(bare), 2),
                "resize_median": round(statistics.median(resizes), 2),
                "resize_worst": round(max(resizes), 2),
                "ratio": round(statistics.median(resizes) / statistics.median(bare), 2),
            }
        )
    )


def bare_start(ranks: int) -> float:
    """Seconds from mpirun's launch to the end of the first allreduce."""
    command = [program("mpirun"), "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    start = time.time()
    done = subprocess.run(
        [*command, sys.executable, "-c", BARE],
        env=os.environ | mpi_environment() | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1]) - start


def resize(job: Path, run: Path, environment: dict[str, str]) -> float:
    """Seconds of the one resize of a new run."""
    command = [sys.executable, "-m", "hpc_absa", "run", str(job), "--run-dir", str(run)]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    (event,) = [e for e in EventLog(run / "events.jsonl").read() if e["event"] == "resize"]
    return float(event["seconds"])


@contextmanager
def surroundings(launcher: str) -> Iterator[dict[str, str]]:
    """The environment of runs; for `slurm` with a cluster that is started for it."""
    environment = os.environ | mpi_environment() | {"OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if launcher != "slurm":
        yield environment
        return
    from tests.slurm.cluster import Cluster

    with tempfile.TemporaryDirectory(prefix="absa-slurm-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield environment | {"SLURM_CONF": str(cluster.configuration)}
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
