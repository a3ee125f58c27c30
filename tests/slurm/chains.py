"""A chain of batch jobs under test: started, watched, disturbed, compared."""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

from hpc_absa.report.timing import account, cost
from hpc_absa.rundir import RunDir
from tests.mpi.conftest import find_mpirun, mpi_environment
from tests.mpi.jobs import write_job
from tests.slurm.cluster import Cluster, wait_until
from tests.supervised import Supervised


class ChainRun(Supervised):
    """`hpc-absa run --launcher slurm` of the small reproducible job, one rank a node."""

    timeout = 240.0

    def __init__(self, cluster: Cluster, folder: Path, *settings: str, most: int = 2) -> None:
        self.cluster, self.folder = cluster, folder
        mpirun = find_mpirun()
        assert mpirun
        words = ["--launcher", "slurm"]
        for setting in ("launch.ranks_per_node=1", *settings):
            words += ["--set", setting]
        super().__init__(
            write_job(folder, most=most, reproducible=True),
            RunDir(folder / "run"),
            *words,
            environment=mpi_environment(mpirun)
            | {"SLURM_CONF": str(cluster.configuration), "COLUMNS": "200"},
        )

    def command(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run an `hpc-absa` command to its end."""
        return subprocess.run(
            [sys.executable, "-m", "hpc_absa", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def links(self) -> list[tuple[int, str]]:
        """Number and outcome of each link that ended, in order."""
        ended = [e for e in self.events("link") if e["action"] == "ended"]
        return [(e["link"], e["outcome"]) for e in ended]

    def job_of(self, link: int) -> str:
        """The id of a link's job."""
        return str(next(e for e in self.events("link") if e["link"] == link)["job_id"])

    def sizes(self) -> list[tuple[int, int]]:
        """Nodes and ranks of each link as submitted."""
        submitted = [e for e in self.events("link") if e["action"] == "submitted"]
        return [(e["nodes"], e["ranks"]) for e in submitted]

    def assert_each_submitted_once(self) -> None:
        """By Slurm's records: one job for every name of this chain."""
        names = self.cluster.command("squeue", "-h", "-a", "-t", "all", "-o", "%A %j").splitlines()
        submitted = [e for e in self.events("link") if e["action"] == "submitted"]
        mine = {str(e["job_id"]) for e in submitted}
        assert len(mine) == len(submitted) == len({e["link"] for e in submitted})
        prefix = next(n.split()[1] for n in names if n.split()[0] in mine).rpartition("-")[0]
        of_chain = {n.split()[0] for n in names if n.split()[1].startswith(f"{prefix}-")}
        assert of_chain == mine, names

    def assert_charged_as_in_slurms_records(self) -> None:
        """Rank-seconds of the report against Slurm's record of completed jobs, in whole seconds.

        Slurm also counts what a batch job takes before its ranks start and after they ended.
        """
        jobs = {str(e["job_id"]): e["ranks"] for e in self.events("link") if "ranks" in e}
        wait_until(
            lambda: jobs.keys() <= {j["JobId"] for j in self.cluster.completed()},
            20,
            "record of every job",
        )
        theirs = 0.0
        for record in self.cluster.completed():
            if record["JobId"] in jobs:
                assert int(record["ProcCnt"]) == jobs[record["JobId"]]
                begin, end = (
                    datetime.fromisoformat(record[k]).timestamp() for k in ("StartTime", "EndTime")
                )
                theirs += (end - begin) * int(record["ProcCnt"])
        written = self.run.log.read()
        spent = cost(written, account(written))
        assert spent.chained
        overhead = 8.0 * sum(jobs.values())
        assert theirs - overhead <= spent.charged <= theirs + sum(jobs.values())

    def diagnostics(self) -> str:
        """Queue, nodes, events and logs."""
        logs = "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.run.logs.glob("*"))
        )
        queue = self.cluster.command("squeue", "-a", "-t", "all")
        events = "\n".join(map(str, self.run.log.read()[-30:]))
        return f"{queue}\n{self.cluster.command('sinfo')}\n{events}\n{logs}"


def alone(folder: Path, *settings: str) -> RunDir:
    """The same job on one rank, undisturbed, by mpirun: what every chain must end with."""
    run = RunDir(folder / "alone")
    job = write_job(folder, most=1, reproducible=True)
    words = [sys.executable, "-m", "hpc_absa", "train", str(job), "--run-dir", str(run.path)]
    for setting in settings:
        words += ["--set", setting]
    mpirun = find_mpirun()
    assert mpirun
    subprocess.run(
        [str(mpirun), "-np", "1", *words],
        env=os.environ | mpi_environment(mpirun),
        check=True,
        capture_output=True,
        timeout=120,
    )
    return run
