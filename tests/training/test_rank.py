"""One rank as a process of its own: exit status and output of `hpc-absa train`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_absa import config
from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import CollectiveError, ExitStatus
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import SUPERVISED
from hpc_absa.training import rank
from tests.training.runs import JOB

ROOT = Path(__file__).parents[2]


def train(folder, text=JOB):
    """`hpc-absa train` of the job in `folder` on one rank, without a launcher."""
    path = folder / "job.toml"
    path.write_text(text)
    return subprocess.run(
        [sys.executable, "-m", "hpc_absa", "train", str(path), "--run-dir", str(folder / "run")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_a_phase_that_ends_for_more_ranks_prints_the_next_command(tmp_path):
    done = train(tmp_path, JOB.replace("[ranks]\nmax = 1", "[ranks]\nmax = 3"))
    assert done.returncode == ExitStatus.OK, done.stdout + done.stderr
    job, run = tmp_path / "job.toml", RunDir(tmp_path / "run")
    command = f"next phase: mpirun -np 2 hpc-absa train {job} --run-dir {run.path}"
    assert done.stdout.splitlines()[-1] == command
    assert "decision at epoch 1" in run.rank_log(1, 0).read_text()
    written = run.job.read_text()
    assert not run.failure.exists()
    refused = train(tmp_path, JOB.replace("width = 2", "width = 3"))
    assert refused.returncode == ExitStatus.USAGE
    assert "another job: model.width = 2 there, 3 here" in refused.stdout
    assert run.job.read_text() == written


def test_scipy_which_takes_long_is_not_imported_at_the_start():
    code = "import sys, hpc_absa.training.rank; print('scipy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_run_directory_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    run = RunDir(tmp_path / "file" / "run")
    with pytest.raises(
        CollectiveError, match=r"run: the run cannot be written there: .*Not a directory"
    ):
        rank.Session(SerialCommunicator(), run, sys.stdout).begin(lambda: config.parse(JOB, "job"))


@pytest.mark.parametrize(
    ("lr", "problem"),
    [(0.1, "decide failed: ZeroDivisionError"), (-1, "lr returned -1, expected a finite")],
)
def test_a_user_defined_rule_that_fails_ends_the_run_with_one_line(tmp_path, lr, problem):
    start, end = JOB.index("[schedule]"), JOB.index("[hessian]")
    rule = f"""[schedule]
method = "tests.schedules.test_own:Faulty"
base_batch = 16
answer = "raise"
lr_answer = {lr}
"""
    done = train(tmp_path, JOB[:start] + rule + JOB[end:])
    assert done.returncode == ExitStatus.USAGE, done.stdout + done.stderr
    line = f"schedule.method: tests.schedules.test_own:Faulty.{problem}"
    assert done.stdout.count(line) == 1
    assert "Traceback" not in done.stdout + done.stderr


OWN_OUTPUT = """
import sys
from pathlib import Path
from hpc_absa.rundir import RunDir
from hpc_absa.training.rank import launcher_output, redirect_output

class Tee:
    def write(self, text):
        sys.__stdout__.write(text)

    def flush(self):
        sys.__stdout__.flush()

sys.stdout = Tee()
console = launcher_output()
redirect_output(RunDir(Path(sys.argv[1])).create(), 1, 0)
print("in the log")
print("on the console", file=console)
"""


def test_a_script_may_have_put_an_object_of_its_own_in_place_of_standard_output(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", OWN_OUTPUT, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT), SUPERVISED: "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "on the console\n", done.stderr
    assert RunDir(tmp_path).rank_log(1, 0).read_text() == "in the log\n"
