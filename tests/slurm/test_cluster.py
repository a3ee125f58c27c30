"""The cluster itself, which the other tests here use."""

import pytest

from tests.slurm.cluster import NODES, wait_until

pytestmark = pytest.mark.slurm


def test_a_job_runs_on_all_four_nodes(cluster, tmp_path):
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\nsrun --mpi=none sh -c 'echo $SLURMD_NODENAME'\n")
    output = tmp_path / "out"
    job = cluster.command("sbatch", "--parsable", "-N4", "-n4", f"--output={output}", str(script))
    wait_until(lambda: job not in cluster.jobs(), 60, "end of the job")
    assert sorted(output.read_text().split()) == list(NODES)
    wait_until(
        lambda: any(j["JobId"] == job for j in cluster.completed()), 20, "record of its completion"
    )
    (record,) = [j for j in cluster.completed() if j["JobId"] == job]
    assert (record["JobState"], record["NodeCnt"]) == ("COMPLETED", "4")
