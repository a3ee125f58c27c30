"""The loop takes the steps that the planner counts, and a user's own rule decides in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpc_absa import config
from hpc_absa.plan import plan, training_samples
from hpc_absa.rundir import RunDir

ROOT = Path(__file__).parents[2]
JOB = """
name = "counting"
[data]
name = "digits"
[model]
name = "digits-cnn"
width = 2
[train]
epochs = 4
microbatch = 32
lr = 0.01
milestones = [1, 3]
lr_decay = 0.5
drop_last = DROP_LAST
threads_per_rank = 1
[schedule]
base_batch = 96
max_batch = 320
METHOD
[ranks]
max = 1
"""
OWN = 'method = "tests.schedules.test_own:Doubling"\nevery = 1'


def train(folder, drop_last, method):
    """The job, and what `hpc-absa train` came to on one rank."""
    path = folder / "job.toml"
    path.write_text(JOB.replace("DROP_LAST", drop_last).replace("METHOD", method))
    words = [sys.executable, "-m", "hpc_absa", "train", str(path), "--run-dir", str(folder / "run")]
    done = subprocess.run(
        words,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    return config.load(path), done, RunDir(folder / "run").log.read()


@pytest.mark.parametrize(
    ("drop_last", "method"), [("true", 'method = "gg"'), ("false", OWN)], ids=["drop", "carry"]
)
def test_the_loop_takes_the_steps_that_the_planner_counts(tmp_path, drop_last, method):
    job, done, log = train(tmp_path, drop_last, method)
    assert done.returncode == 0, done.stdout + done.stderr
    planned = plan(job, training_samples(job), 1)["course"]
    assert log[-1]["event"] == "done"
    assert log[-1]["steps"] == planned.steps
    by_batch = {}
    for phase in planned.phases:
        by_batch[phase.global_batch] = by_batch.get(phase.global_batch, 0) + phase.steps
    starts = [e["global_batch"] for e in log if e["event"] == "phase_start"]
    ends = [e["steps"] for e in log if e["event"] == "phase_end"]
    assert dict(zip(starts, ends, strict=True)) == by_batch
    assert len(by_batch) == 3


def test_a_rule_that_fails_ends_the_run_with_one_line(tmp_path):
    method = 'method = "tests.schedules.test_own:Faulty"\nanswer = "raise"\nlr_answer = 0.1'
    _, done, _ = train(tmp_path, "false", method)
    assert done.returncode == 2, done.stdout + done.stderr
    told = "schedule.method: tests.schedules.test_own:Faulty.decide failed: ZeroDivisionError"
    assert done.stdout.count(told) == 1
    assert "Traceback" not in done.stdout + done.stderr
