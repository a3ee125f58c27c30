"""Options that use the whole gradient of a step give the same result at any number of ranks."""

import subprocess
import sys

import pytest

from hpc_absa.rundir import RunDir
from tests.mpi.jobs import final_weights, relative_difference

pytestmark = pytest.mark.mpi

JOB = """
name = "options"
[data]
name = "digits"
[model]
name = "digits-cnn"
width = 4
[train]
epochs = 3
microbatch = 16
lr = 0.05
weight_decay = 1e-3
no_decay_norm_bias = true
max_grad_norm = 0.5
label_smoothing = 0.1
channels_last = true
annealing = "cosine"
threads_per_rank = 1
[schedule]
method = "gns"
base_batch = 64
max_batch = 512
warmup_epochs = 1
lr_rule = "square-root"
[ranks]
initial = {ranks}
max = {ranks}
"""


def test_noise_scale_clipping_and_channels_last_are_equal_on_one_and_two_ranks(mpirun, tmp_path):
    runs = []
    for ranks in (1, 2):
        job, run = tmp_path / f"{ranks}.toml", RunDir(tmp_path / f"run{ranks}")
        job.write_text(JOB.format(ranks=ranks))
        arguments = ["train", str(job), "--run-dir", str(run.path)]
        if ranks == 1:
            command = [sys.executable, "-m", "hpc_absa", *arguments]
            subprocess.run(command, check=True, timeout=60, capture_output=True)
        else:
            mpirun(ranks, "hpc_absa", *arguments)
        runs.append(run)
    decisions = [[e for e in run.log.read() if e["event"] == "decision"] for run in runs]
    assert [e["action"] for e in decisions[0]].count("grow") > 0
    for one, other in zip(*decisions, strict=True):
        assert one["next_batch"] == other["next_batch"]
        assert one.get("noise_scale") == pytest.approx(other.get("noise_scale"), rel=1e-3)
    assert relative_difference(*(final_weights(run.path) for run in runs)) < 1e-4
