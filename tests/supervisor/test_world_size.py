"""Ranks that were started together and did not connect do not train."""

import os
import subprocess
import sys

import pytest

from hpc_absa.rundir import RunDir
from tests.mpi.jobs import write_job

SLURM = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
RANK = {"SLURM_STEP_ID": "SLURM_PROCID", "PMI_SIZE": "PMI_RANK", "HPC_ABSA_RANKS": "SLURM_PROCID"}


@pytest.mark.parametrize(
    "variables",
    [
        SLURM,
        pytest.param({"PMI_SIZE": "2"}, marks=pytest.mark.slow),
        pytest.param({**SLURM, "PMI_SIZE": "2"}, marks=pytest.mark.slow),
        {"HPC_ABSA_RANKS": "2"},
    ],
)
def test_two_worlds_of_one_rank_are_refused_with_one_line(tmp_path, variables):
    job, run = write_job(tmp_path), RunDir(tmp_path / "run")
    words = [sys.executable, "-m", "hpc_absa", "train", str(job), "--run-dir", str(run.path)]
    processes = []
    for rank in range(2):
        ranks = {RANK[name]: str(rank) for name in variables if name in RANK}
        environment = os.environ | variables | ranks
        processes.append(
            subprocess.Popen(
                words,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], outputs
    lines = [line for output in outputs for line in output.splitlines() if "hpc-absa:" in line]
    (line,) = lines
    assert "is 2, but MPI_COMM_WORLD has size 1: the ranks have not connected" in line
    assert not run.checkpoint_files()


@pytest.mark.mpi
def test_under_a_supervisor_they_end_the_run_with_one_line(tmp_path):
    """mpirun starts processes that do not know it: each would be a complete run."""
    job, run = write_job(tmp_path, initial=2), RunDir(tmp_path / "run")
    hidden = 'launch.extra=["env", "-u", "OMPI_COMM_WORLD_SIZE"]'
    words = [sys.executable, "-m", "hpc_absa", "run", str(job), "--run-dir", str(run.path)]
    done = subprocess.run([*words, "--set", hidden], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert "HPC_ABSA_RANKS is 2, but MPI_COMM_WORLD has size 1" in line
    (event,) = run.log.read()
    assert (event["event"], event["reason"] in line) == ("error", True)
