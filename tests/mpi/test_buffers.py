"""Buffers, and gradients with activation checkpointing, on real ranks: equal, and those of one."""

from pathlib import Path

import pytest
import torch

from hpc_absa.data.order import microbatch_seed
from hpc_absa.errors import ExitStatus
from tests.mpi.buffers_program import PER_STEP, build
from tests.mpi.jobs import write_job
from tests.training import random_models

pytestmark = pytest.mark.mpi

PROGRAM = Path(__file__).with_name("buffers_program.py")
NAMES = [*random_models.LAYERS, "3", "7"]


def test_two_ranks_end_as_a_plain_loop_of_pytorch(mpirun, tmp_path):
    mpirun(2, PROGRAM, tmp_path, *NAMES, timeout=280)
    for index, name in enumerate(NAMES):
        plain = build(name)
        steps = random_models.data(2, PER_STEP, dtype=torch.float64)
        random_models.plain_loop(plain, steps, 0.05, lambda k: microbatch_seed(0, k))
        state = torch.load(tmp_path / f"{index}.pt")
        torch.testing.assert_close(
            state,
            dict(plain.state_dict()),
            rtol=1e-9,
            atol=1e-12,
            msg=name,
        )


RANKED = """
import os
import torch
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 10))
        self.teacher = nn.Parameter(torch.zeros(3), requires_grad=False)

    def forward(self, x):
        if self.training:
            self.teacher.data += float(os.environ["OMPI_COMM_WORLD_RANK"])
        return super().forward(x)
"""


def test_a_state_that_differs_between_ranks_is_not_saved(mpirun, tmp_path):
    (tmp_path / "ranked.py").write_text(RANKED)
    job = write_job(tmp_path, initial=2, most=2)
    text = job.read_text().replace('"digits-cnn"\nwidth = 4', '"ranked:Net"')
    job.write_text(text)
    run = tmp_path / "run"
    done = mpirun(
        2,
        "hpc_absa",
        "train",
        job,
        "--run-dir",
        run,
        check=False,
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == ExitStatus.FAILED, done.stdout + done.stderr
    assert "model/teacher differs between rank 0 and rank 1" in done.stdout
    assert not list((run / "checkpoints").glob("*.h5"))
