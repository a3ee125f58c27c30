"""A language model on ragged text, with AdamW and a worker process: two ranks end as one."""

import h5py
import pytest
import torch

from hpc_absa.rundir import RunDir
from tests.mpi.jobs import final_weights
from tests.training import runs

pytestmark = pytest.mark.mpi

JOB = """
name = "text"
[data]
name = "tests.data.kinds:text"
workers = {workers}
[model]
name = "tests.data.kinds:LanguageModel"
[train]
epochs = 3
microbatch = 4
lr = 0.01
optimizer = "adamw"
threads_per_rank = 1
reproducible = true
metrics = ["perplexity", "f1", "top3"]
[schedule]
method = "abs"
base_batch = 8
max_batch = 16
kappa = 1
[hessian]
samples = 16
[ranks]
max = {ranks}
"""


def in_this_process(folder, monkeypatch):
    """One rank without a worker."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(runs, "JOB", JOB.format(workers=0, ranks=1))
    runs.train(folder)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def test_two_ranks_have_the_bits_of_one(mpirun, tmp_path, monkeypatch):
    weights, measured = [], []
    in_this_process(tmp_path / "run1", monkeypatch)
    job = tmp_path / "job.toml"
    job.write_text(JOB.format(workers=1, ranks=2))
    mpirun(2, "hpc_absa", "train", job, "--run-dir", tmp_path / "run2", timeout=200)
    for run in (tmp_path / "run1", tmp_path / "run2"):
        weights.append(final_weights(run).tobytes())
        events = RunDir(run).log.read()
        assert events[-1]["event"] == "done"
        kept = ("test_loss", "train_loss", "metrics", "eigenvalue", "next_batch")
        chosen = [e for e in events if e["event"] in ("epoch", "decision")]
        measured.append([{key: e.get(key) for key in kept} for e in chosen])
        with h5py.File(RunDir(run).checkpoint_files()[-1]) as file:
            assert {"exp_avg.head.weight", "step.head.weight"} <= set(file["optimizer"])
    assert weights[0] == weights[1]
    assert measured[0] == measured[1]
