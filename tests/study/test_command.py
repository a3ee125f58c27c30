"""`hpc-absa compare` as a command, with real runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_absa.rundir import RunDir

SWEEP = """
name = "tiny"
side_by_side = 2
[job]
data = { name = "digits" }
model = { name = "digits-cnn", width = 4 }
train = { epochs = 1, microbatch = 64, lr = 0.05, threads_per_rank = 1 }
schedule = { method = "absa", base_batch = 128 }
ranks = { max = 1 }
[[grid]]
schedule = ["bl", "gns"]
max_batch = [256]
"""
ROOT = Path(__file__).parents[2]


def compare(folder, *options):
    command = [sys.executable, "-m", "hpc_absa", "compare", str(folder / "sweep.toml")]
    command += ["--out", str(folder / "out"), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.mpi
def test_sweep_of_real_runs(tmp_path):
    (tmp_path / "sweep.toml").write_text(SWEEP)
    done = compare(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[1/2] bl-256-seed0: " in done.stderr
    for cell in ("bl-256-seed0", "gns-256-seed0"):
        log = RunDir(tmp_path / "out" / cell).log.read()
        assert log[-1]["event"] == "done"
        assert f"| {log[-1]['steps']} |" in done.stdout
    assert "**Test accuracy and SGD iterations**" in done.stdout
    assert "**Where the time went, seconds**" in done.stdout
    assert (tmp_path / "out" / "tables" / "time.tex").exists()
    again = compare(tmp_path)
    assert again.returncode == 0
    assert again.stdout == done.stdout
    assert "2 of 2 cells were done before" in again.stderr


def test_dry_run_starts_nothing(tmp_path):
    (tmp_path / "sweep.toml").write_text(SWEEP)
    done = compare(tmp_path, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("bl-256-seed0: new\ngns-256-seed0: new\n")
    assert not (tmp_path / "out").exists()


def test_error_in_the_sweep_file_is_one_line_and_status_2(tmp_path):
    (tmp_path / "sweep.toml").write_text(SWEEP.replace('"bl"', '"blu"'))
    done = compare(tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("hpc-absa: ")
    assert "schedule.method = 'blu': expected one of" in line
