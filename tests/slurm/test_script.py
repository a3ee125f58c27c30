"""`hpc-absa launch` with a real script: as a chain of batch jobs, and by srun in an allocation."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.mpi.jobs import final_weights
from tests.slurm.chains import ChainRun
from tests.slurm.cluster import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).parents[1] / "supervisor" / "elastic_script.py"


class Launched(ChainRun):
    """The script, which does not kill itself, on up to two ranks."""

    def __init__(self, cluster, folder, *options):
        super().__init__(cluster, folder)
        (folder / "killed").touch()
        self.words = [sys.executable, "-m", "hpc_absa", "launch", "--run-dir", str(self.run.path)]
        self.words += ["--max-ranks", "2", *options, "--"]
        self.words += ["python", str(SCRIPT), str(folder / "killed")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Final weights of the script alone."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "killed").touch()
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[2])}
    words = [sys.executable, SCRIPT, "killed"]
    subprocess.run(words, cwd=folder, env=environment, check=True, capture_output=True)
    return final_weights(folder / "runs" / "elastic_script")


def test_a_script_is_a_chain_of_batch_jobs(cluster, tmp_path, weights):
    options = ("--launcher", "slurm", "--set", "launch.ranks_per_node=1")
    chain = Launched(cluster, tmp_path, *options)
    code, output = chain.start().finish()
    assert code == 0, output
    assert chain.sizes() == [(1, 1), (2, 2)]
    assert [e["ranks"] for e in chain.events("phase_start")] == [1, 2, 2]
    assert chain.links() == [(1, "resize"), (2, "done")]
    chain.assert_each_submitted_once()
    assert np.array_equal(weights, final_weights(chain.run.path))
    assert chain.run.report.exists()
    assert '"link": 2' in chain.command("status", str(chain.run.path), "--json").stdout


def test_srun_starts_the_ranks_of_a_script(cluster, tmp_path, weights):
    output = cluster.command("srun", "--mpi=pmix", "--ntasks=1", "true")
    if "plugin" in output:
        pytest.skip(f"Slurm's PMIx plugin does not work (Debian: libpmix-dev): {output}")
    chain = Launched(cluster, tmp_path, "--set", 'launch.extra=["--mpi=pmix"]')
    words = [*chain.words[:-4], "--launcher", "srun", *chain.words[-4:]]
    environment = cluster.environment | chain.environment
    done = subprocess.run(
        ["salloc", "--nodes=1", "--ntasks=2", "--cpus-per-task=1", *words],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [e["ranks"] for e in chain.events("phase_start")] == [1, 2, 2]
    assert np.array_equal(weights, final_weights(chain.run.path))
    wait_until(lambda: not cluster.jobs(), 60, "the end of the allocation")
