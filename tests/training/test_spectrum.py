"""`hpc-absa spectrum` on a checkpoint of a real run, on one rank and under mpirun."""

import json
import subprocess
import sys

import h5py
import pytest

from hpc_absa.rundir import RunDir
from hpc_absa.rundir.paths import checkpoint_files
from tests.mpi.conftest import find_mpirun, mpi_environment
from tests.mpi.jobs import write_job


def hpc_absa(*arguments, ranks=0):
    command = [sys.executable, "-m", "hpc_absa", *map(str, arguments)]
    environment = None
    if ranks:
        command = [str(find_mpirun()), "--oversubscribe", "-np", str(ranks), *command]
        environment = mpi_environment(find_mpirun())
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
@pytest.mark.mpi
def test_the_spectrum_of_a_checkpoint(tmp_path):
    job, run = write_job(tmp_path, most=1), tmp_path / "run"
    trained = hpc_absa("train", job, "--run-dir", run, "--set", "train.epochs=1")
    assert trained.returncode == 0, trained.stdout
    checkpoint = checkpoint_files(RunDir(run).checkpoints)[-1]
    out = tmp_path / "spectrum"
    done = hpc_absa("spectrum", checkpoint, "--samples", 64, "--k", 2, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["samples"] == 64
    assert result["top"]["values"][0] >= result["top"]["values"][1] > 0
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with h5py.File(out.with_suffix(".h5")) as file:
        assert "top" in file
    options = ("--samples", 64, "--k", 2, "--no-layers")
    two = hpc_absa("spectrum", checkpoint, *options, "--json", ranks=2)
    assert two.returncode == 0, two.stderr
    assert json.loads(two.stdout)["top"]["values"] == pytest.approx(result["top"]["values"], 1e-6)
    part = hpc_absa("spectrum", checkpoint, *options, "--gauss-newton")
    assert part.stdout.startswith("Gauss-Newton matrix of the mean loss over 64 samples, ")
    assert "Loss along the top eigenvectors" in part.stdout


def test_a_missing_file_is_reported_in_one_line(tmp_path):
    done = hpc_absa("spectrum", tmp_path / "no.h5")
    assert done.returncode == 1
    assert done.stderr.strip() == f"hpc-absa: {tmp_path}/no.h5: no such file"
