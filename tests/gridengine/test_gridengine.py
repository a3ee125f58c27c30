"""The script for one allocation, on a real Grid Engine."""

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from hpc_absa.rundir import RunDir
from tests.gridengine.cell import Cell, missing
from tests.mpi.conftest import find_mpirun, mpi_environment
from tests.mpi.jobs import final_weights, write_job
from tests.slurm.chains import alone
from tests.slurm.cluster import wait_until

pytestmark = [pytest.mark.gridengine, pytest.mark.timeout(300)]

SCRIPT = Path(__file__).parents[2] / "launch" / "gridengine.sh"


@pytest.fixture(scope="module")
def cell():
    """A queue of two slots on this machine."""
    if why := missing():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(prefix="absa-sge-", ignore_cleanup_errors=True) as folder:
        cell = Cell(Path(folder))
        try:
            cell.start()
            yield cell
        finally:
            cell.stop()


def test_a_job_grows_within_its_allocation(cell, tmp_path):
    job, run = write_job(tmp_path, most=2, reproducible=True), RunDir(tmp_path / "run")
    environment = mpi_environment(find_mpirun()) | {
        "VENV": sys.prefix,
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(SCRIPT.parents[1]),
    }
    settings = ",".join(f"{name}={value}" for name, value in environment.items())
    words = ("-pe", "mpi", "2", "-o", str(tmp_path / "output"), "-v", settings, str(SCRIPT))
    number = cell.submit(tmp_path, *words, str(job), "--run-dir", str(run.path))
    try:
        wait_until((tmp_path / "output").exists, 60, "start of the job")
    except AssertionError:
        states = cell.command("qstat", "-f", "-explain", "aE"), cell.command("qstat", "-j", number)
        pytest.skip(f"Grid Engine does not start jobs here: {states}")
    ended = lambda: run.log.last("done") or number not in cell.jobs()  # noqa: E731
    wait_until(ended, 150, f"end of the job, which wrote to {tmp_path}/output")
    output = (tmp_path / "output").read_text()
    assert [e["ranks"] for e in run.log.read() if e["event"] == "phase_start"] == [1, 2, 2], output
    assert run.log.last("done"), output
    assert np.array_equal(final_weights(alone(tmp_path).path), final_weights(run.path))
    wait_until(lambda: "exit_status  0" in cell.command("qacct", "-j", number), 30, "the record")
