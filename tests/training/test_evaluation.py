"""A run's model measured, exported and started from; a job file to begin with."""

import json

import numpy as np
import pytest
import torch

from hpc_absa import config
from hpc_absa.cli import models as commands
from hpc_absa.errors import CollectiveError, HpcAbsaError, UsageError
from hpc_absa.models import build
from hpc_absa.models.weights import write_weights
from hpc_absa.rundir import RunDir
from hpc_absa.training.evaluate import Evaluation
from tests.training import runs
from tests.training.runs import events

QUICK = ("train.epochs=1", "hessian.samples=8")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    threads = torch.get_num_threads()
    trainer = runs.trainer(folder, *QUICK)
    trainer.train()
    torch.set_num_threads(threads)
    return folder, trainer


@pytest.mark.parametrize("of", ["run", "checkpoint"])
def test_evaluate_prints_what_the_run_measured(run, capsys, of):
    folder, _ = run
    path = folder if of == "run" else RunDir(folder).checkpoint_files()[-1]
    assert commands.evaluate(path, as_json=True) == 0
    printed = json.loads(capsys.readouterr().out)
    (epoch,) = events(folder, "epoch")
    assert printed["loss"] == epoch["test_loss"]
    assert printed["metrics"] == {"accuracy": epoch["test_accuracy"]}
    assert (printed["test_samples"], printed["epoch"]) == (50, 1)
    commands.evaluate(path)
    assert f"accuracy {epoch['test_accuracy']:.2%}" in capsys.readouterr().out


def test_evaluate_without_a_target_that_counts_prints_no_loss(run, capsys, monkeypatch):
    monkeypatch.setattr("hpc_absa.training.evaluation.evaluate", lambda *_: Evaluation(None))
    assert commands.evaluate(run[0]) == 0
    assert capsys.readouterr().out.endswith(".h5: 50 test samples\n")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".npz"])
def test_an_exported_model_is_the_runs_and_another_run_starts_from_it(run, tmp_path, suffix):
    folder, trainer = run
    out = tmp_path / f"model{suffix}"
    commands.export(folder, out)
    started = runs.trainer(tmp_path / "run", *QUICK, f"model.weights={out}")
    expected = trainer.model.state_dict()
    assert started.model.state_dict().keys() == expected.keys()
    for name, tensor in started.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    if suffix == ".pt":
        plain = build("digits-cnn", {"width": 2}, 1, 8, 4)
        plain.load_state_dict(torch.load(out))
    started.train()
    out.unlink()  # a run that continues does not need it
    again = runs.trainer(tmp_path / "run", *QUICK, f"model.weights={out}")
    assert again.run.samples == started.run.samples


def test_parts_can_keep_their_new_weights(run, tmp_path):
    folder, trainer = run
    commands.export(folder, tmp_path / "model.npz")
    weights = f"model.weights={tmp_path / 'model.npz'}"
    started = runs.trainer(tmp_path, *QUICK, weights, "model.weights_skip=['classifier.']")
    new = runs.trainer(tmp_path / "new", *QUICK).model.state_dict()
    old = trainer.model.state_dict()
    for name, tensor in started.model.state_dict().items():
        assert torch.equal(tensor, (new if name.startswith("classifier.") else old)[name]), name
    with pytest.raises(
        CollectiveError, match=r"model.weights = .*: features.0.weight has shape \[2, 1, 3, 3\]"
    ):
        runs.trainer(tmp_path / "wide", *QUICK, weights, "model.width=3")
    with pytest.raises(CollectiveError, match=r"model.weights: .*: no such file"):
        runs.trainer(tmp_path / "none", *QUICK, "model.weights=none.pt")


def test_export_of_what_is_no_run_is_one_line(tmp_path):
    with pytest.raises(HpcAbsaError, match="no checkpoint in this folder"):
        commands.export(tmp_path, tmp_path / "model.pt")
    with pytest.raises(OSError, match="No such file"):  # shown as one line
        write_weights(tmp_path / "none" / "model.pt", {"w": np.zeros(1)})
    assert not (tmp_path / "model.pt").exists()


# init


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"schedule.method": "absa", "train.optimizer": "sgd", "model.name": "digits-cnn"}),
        (
            {"data": "m:f", "model": "m:g", "optimizer": "adamw", "loss": "mse", "root": "/d"},
            {
                "schedule.method": "abs",
                "schedule.lr_rule": "square-root",
                "train.loss": "mse",
                "train.lr": 1e-3,
                "data.root": "/d",
            },
        ),
    ],
)
def test_init_writes_a_job_file(tmp_path, options, expected):
    path = tmp_path / "mine.toml"
    commands.init(path, **options)
    job = config.load(path)
    assert job.name == "mine"
    for key, value in expected.items():
        table, name = key.split(".")
        assert getattr(getattr(job, table), name) == value
    everything = path.read_text().replace("\n# ", "\n")
    assert "nesterov" in everything or "betas" in everything
    with pytest.raises(UsageError, match="exists; remove it"):
        commands.init(path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": "cifar10"}, "--model: missing"),
        ({"optimizer": "adm"}, "train.optimizer = 'adm': expected one of sgd"),
    ],
)
def test_init_refuses_what_no_job_can_have(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        commands.init(tmp_path / "job.toml", **options)
    assert not (tmp_path / "job.toml").exists()


def test_the_job_of_init_with_its_comments_removed_is_a_job(tmp_path):
    commands.init(tmp_path / "job.toml", optimizer="lamb")
    lines = (tmp_path / "job.toml").read_text().splitlines()
    chosen = ("# workers", "# [optimizer]", "# betas", "# metrics", "# kappa", "# milestones")
    text = "\n".join(line[2:] if line.startswith(chosen) else line for line in lines)
    job = config.parse(text, "test")
    assert job.optimizer.arguments["betas"] == [0.9, 0.95]
