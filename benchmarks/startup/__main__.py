"""From the decision for more ranks to the first step with them.

    python -m benchmarks.startup [--launcher mpirun|horovodrun|slurm] [--rounds 10]

One rank to two, and two to four. A resize is timed by the run's events: from the `decision` to the
event `resize`, which is the end of the first step of the next phase: the save, the end of the old
ranks, the start of the new ones, the restored state and a step. Its limit is the bare start of the
same ranks: mpirun of the imports, `hvd.init()` and one allreduce, from the launch to the
allreduce's end. For torchrun (a second agent joins) and Horovod Elastic (the list of hosts changes)
it is the time from that change to a step with the new number of ranks; they save nothing.
`slurm` starts a four-node Slurm, as the tests do; there the limit is a bare batch job: sbatch of
the same mpirun on as many nodes, from the submission. `queued` is the time from the submission of
the next batch job to its start. Bytecode is kept, as for any installed package.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks import results
from benchmarks.results import Comparison, Measure, Numbers
from benchmarks.startup import rivals
from hpc_absa.rundir.events import EventLog
from hpc_absa.supervisor.launchers import mpi_environment, program

BARE_START = "bare start"
BARE_JOB = "bare batch job"
IMPORTS = "hpc_absa, imports in each launch"
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
microbatch = {microbatch}
lr = 0.05
threads_per_rank = 1
[schedule]
method = "absa"
base_batch = 32
max_batch = 64
beta = 2
kappa = 1
[hessian]
samples = 128
[ranks]
initial = {before}
max = {after}
[launch]
launcher = "{launcher}"
ranks_per_node = 1
"""


def main() -> None:
    parser = results.options(__doc__)
    parser.set_defaults(rounds=10)
    parser.add_argument("--launcher", choices=["mpirun", "horovodrun", "slurm"], default="mpirun")
    options = parser.parse_args()
    launcher, rounds = options.launcher, 3 if options.quick else options.rounds
    tables = []
    with tempfile.TemporaryDirectory() as folder, surroundings(launcher) as environment:
        for before in (1,) if options.quick else (1, 2):
            after = 2 * before
            job = Path(folder) / f"{after}.toml"
            fields = {"microbatch": 32 // before, "before": before, "after": after}
            job.write_text(JOB.format(launcher=launcher, **fields))
            contenders: dict[str, Callable[[], Numbers]] = {
                "hpc_absa": partial(resize, job, environment),
                BARE_START: partial(bare_start, after),
            }
            limit = BARE_START
            if launcher == "slurm":
                limit = BARE_JOB
                contenders[BARE_JOB] = partial(bare_batch_job, after, environment)
            if launcher == "mpirun":
                imports = partial(resize, job, environment, "--set", "launch.fork_server=false")
                contenders[IMPORTS] = imports
                contenders["torchrun"] = partial(rivals.torchrun, before, after)
                contenders["Horovod Elastic"] = partial(rivals.horovod_elastic, before, after)
            table = Comparison(
                f"{before} to {after} ranks, {launcher}",
                {"seconds": Measure("s", "lower"), "of it the save": Measure("s")}
                | ({"queued": Measure("s")} if launcher == "slurm" else {}),
                "hpc_absa",
                (BARE_START, BARE_JOB, IMPORTS),
            )
            table.run(contenders, rounds)
            if ratio := table.ratio("hpc_absa", limit, "seconds"):
                table.note = f"A resize is {ratio:.2f} {limit}s."
            tables.append(table)
    results.write("startup" if launcher == "mpirun" else f"startup-{launcher}", tables, options)


def bare_start(ranks: int) -> Numbers:
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
    return {"seconds": float(done.stdout.split()[-1]) - start}


def bare_batch_job(ranks: int, environment: dict[str, str]) -> Numbers:
    """Seconds from sbatch to the end of the first allreduce, with one rank on each node."""
    with tempfile.TemporaryDirectory() as folder:
        script, output = Path(folder, "job.sh"), Path(folder, "output")
        words = [program("mpirun"), "--bind-to", "none", "-np", str(ranks)]
        words += [sys.executable, "-c", BARE]
        script.write_text(f"#!/bin/bash\nexec {shlex.join(words)}\n")
        options = [f"--nodes={ranks}", "--ntasks-per-node=1", f"--output={output}"]
        start = time.time()
        subprocess.run(
            ["sbatch", "--wait", *options, str(script)],
            env=environment,
            capture_output=True,
            check=True,
        )
        return {"seconds": float(output.read_text().split()[-1]) - start}


def resize(job: Path, environment: dict[str, str], *words: str) -> Numbers:
    """The one resize of a new run."""
    with tempfile.TemporaryDirectory(dir=job.parent) as folder:
        command = [sys.executable, "-m", "hpc_absa", "run", str(job), "--run-dir", f"{folder}/run"]
        subprocess.run([*command, *words], env=environment, check=True, capture_output=True)
        events = EventLog(Path(folder) / "run/events.jsonl").read()
    (end,) = [e for e in events if e["event"] == "resize"]
    (decision,) = [e for e in events if e["event"] == "decision" and e["action"] == "grow"]
    saves = [e["seconds"] for e in events if e.get("step") == decision["step"] and "path" in e]
    numbers = {"seconds": end["time"] - decision["time"], "of it the save": saves[0]}
    links = {e["action"]: e["time"] for e in events if e["event"] == "link" and e["link"] == 2}
    return numbers | ({"queued": links["started"] - links["submitted"]} if links else {})


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
