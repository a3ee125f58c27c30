"""The rehearsal: what a job cannot do is one line before its first step, and nothing is changed."""

import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from hpc_absa import config
from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import CollectiveError, ExitStatus, UsageError
from hpc_absa.training import rehearsal
from hpc_absa.training.named import require_buildable
from tests.training import odd_models, runs

ODD = "tests.training.odd_models"


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def overrides(model=None, loss=None, *more):
    """Of the small job: another model or loss."""
    result = [f'model={{name = "{ODD}:{model}"}}'] if model else []
    return result + ([f"train.loss={ODD}:{loss}"] if loss else []) + list(more)


def refused(tmp_path, *changes):
    """The one line with which the small job is refused before its first step."""
    with pytest.raises(CollectiveError) as error:
        runs.train(tmp_path, *changes)
    assert error.value.status == ExitStatus.USAGE
    assert not runs.events(tmp_path, "epoch", "checkpoint")
    line = str(error.value)
    assert "\n" not in line
    return line


BL = "schedule={method = 'bl', base_batch = 16}"


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ("ComplexWeights", r"the parameter weight is torch\.complex64, expected real numbers"),
        ("OnceDifferentiable", r"it uses a function that cannot be differentiated twice \(Custom"),
        ("ExtraState", r"_extra_state is of type dict; checkpoints contain tensors only"),
        ("lazy", r"the parameter 1\.weight of a lazy layer has no shape yet"),
        ("narrow", r"its forward pass in training mode failed: RuntimeError: mat1 and mat2 shapes"),
        (
            "two_outputs",
            r"returns outputs \[8, 2\] for 8 samples of 4 classes; expected .*\[8, 4\]",
        ),
        ("failing", r"failing failed: KeyError: 'HOME_OF_THE_WEIGHTS' \(.*odd_models\.py:\d+\)"),
        ("without_parameters_used", r"its value does not depend on a trainable parameter"),
    ],
)
def test_a_model_that_cannot_be_trained_is_refused_in_one_line(tmp_path, model, line):
    assert re.search(line, text := refused(tmp_path, *overrides(model))), text


@pytest.mark.parametrize(
    ("kind", "line"),
    [("dict", "it returns a dict"), ("one", r"[8] for 8"), ("few", "[8, 2] for 8")],
)
def test_outputs_in_evaluation_mode_are_checked_too(tmp_path, kind, line):
    model = f'model={{name = "{ODD}:Returning", kind = "{kind}"}}'
    assert line in refused(tmp_path, model)


@pytest.mark.parametrize(
    ("loss", "line"),
    [
        (
            "unreduced",
            "it returned a tensor of shape [8], expected one number, the mean over the samples",
        ),
        ("number", "it returned a float, expected one number"),
        ("infinite", "it is inf before the first step"),
        ("raising", "failed: AttributeError: 'Tensor' object has no attribute 'nothing'"),
        ("constant", "does not depend on a trainable parameter"),
    ],
)
def test_a_loss_that_cannot_be_used_is_refused_in_one_line(tmp_path, loss, line):
    text = refused(tmp_path, *overrides(None, loss))
    assert line in text
    assert f"train.loss = '{ODD}:{loss}'" in text


def test_a_data_set_that_cannot_be_built_is_refused_in_one_line(tmp_path):
    line = refused(tmp_path, f"data.name={ODD}:broken_blocks")
    assert "FileNotFoundError: no such archive: digits.tar" in line
    assert "odd_models.py:" in line


@pytest.mark.parametrize("model", ["compiled", "scripted", "OnceDifferentiable", "SparseEmbedding"])
def test_without_the_hessian_these_models_are_trained(tmp_path, model):
    assert runs.train(tmp_path, *overrides(model, None, BL)).kind == "done"


@pytest.mark.parametrize("setting", ["layer_rates", "layer_precision"])
def test_without_the_hessian_nothing_is_decided_by_layer(tmp_path, setting):
    changes = overrides("OnceDifferentiable", None, BL, f"hessian.{setting}=trace")
    assert "cannot be differentiated twice" in refused(tmp_path, *changes)


@pytest.mark.parametrize("model", ["compiled", "SparseEmbedding"])
def test_with_the_hessian_these_models_are_trained(tmp_path, model):
    assert runs.train(tmp_path, *overrides(model)).kind == "done"
    assert any(event["eigenvalue"] for event in runs.events(tmp_path, "decision"))


def test_sparse_gradients_are_refused_where_sums_are_reproducible(tmp_path):
    changes = overrides("SparseEmbedding", None, BL, "train.reproducible=true")
    assert "the gradient of embedding.weight is sparse: set sparse=False" in refused(
        tmp_path, *changes
    )
    torch.use_deterministic_algorithms(False)


def test_nothing_is_changed(tmp_path):
    trainer = runs.trainer(tmp_path, *overrides("Plain"))
    model = trainer.model
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def everything():
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        values = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        values |= {f"{n}.grad": p.grad.clone() for n, p in model.named_parameters()}
        states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
        flags = [module.training for module in model.modules()]
        return values, states, (flags, model.calls, model.cache)

    before = everything()
    rehearsal.rehearse(trainer)
    after = everything()
    assert all(torch.equal(after[0][name], value) for name, value in before[0].items())
    assert torch.equal(after[1][0], before[1][0])
    assert after[1][1:] == before[1][1:]
    assert after[2] == before[2]


def test_it_runs_once_in_a_launch_and_takes_its_own_kind_of_time(tmp_path, monkeypatch):
    calls = []
    original = rehearsal._rehearse
    monkeypatch.setattr(rehearsal, "_rehearse", lambda t: (calls.append(t), original(t)))
    runs.train(tmp_path)
    seconds = [event["seconds"]["rehearsal"] for event in runs_events(tmp_path)]
    assert len(calls) == 1
    assert 0 < seconds[0] < 2
    assert seconds[1:] == [0, 0]
    runs.train(tmp_path)  # done: there is no step left
    assert len(calls) == 1


def runs_events(folder):
    from hpc_absa.rundir import RunDir

    return [event for event in RunDir(folder).log.read() if event["event"] == "phase_end"]


class OtherRankIsFine(SerialCommunicator):
    """Two ranks, of which the other one does not fail."""

    size = 2

    def allgather_object(self, value):
        return [value, None]


def test_a_failure_of_some_ranks_is_no_usage_error(tmp_path):
    """Not the job is wrong then but a host, so that a restart may help."""
    trainer = runs.trainer(tmp_path, *overrides(None, "raising"))
    trainer.run.comm = OtherRankIsFine()
    with pytest.raises(AttributeError, match="nothing"):
        rehearsal.rehearse(trainer)


@pytest.mark.slow
def test_doctor_rehearses_a_job_in_its_own_process():
    from hpc_absa.doctor.software import check_rehearsal

    good = config.parse(runs.JOB, "test", ())
    finding = check_rehearsal(good)
    assert (finding.status, finding.check) == ("ok", "rehearsal")
    assert re.search(r"took [\d.]+ s; a rank needs \d+ MB of memory", finding.detail)
    finding = check_rehearsal(config.parse(runs.JOB, "test", tuple(overrides("narrow"))))
    assert finding.status == "error"
    assert "mat1 and mat2 shapes" in finding.detail
    absent = config.parse(runs.JOB, "test", ("data={name = 'cifar10', root = '/nowhere'}",))
    finding = check_rehearsal(absent)
    assert finding.status == "error"
    assert "data.root = '/nowhere'" in finding.detail


def test_doctor_rehearses_without_the_current_folder_first_on_the_path(monkeypatch):
    """As ranks run: a `random.py` there would replace Python's."""
    from hpc_absa.doctor import software

    commands = []

    def answer(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, '{"seconds": 1.0, "memory": 1}\n', "")

    monkeypatch.setattr(software.subprocess, "run", answer)
    assert software.check_rehearsal(config.parse(runs.JOB, "test", ())).status == "ok"
    assert commands[0][:2] == [sys.executable, "-P"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.name=resnet21", "model.name: no model"),
        ("model.wide=3", "model.wide: digits-cnn has no such argument"),
        ("model.width=wide", "model.name = 'digits-cnn' failed: "),
        ("loss.delta=3", "loss.delta"),
        ("optimizer.beta=3", "optimizer.beta"),
        ("model.name=tests.nowhere:net", "tests.nowhere"),
        ("data.name=tests.training.runs:no_such", "no_such"),
        ("schedule.method=tests.nowhere:Rule", "tests.nowhere"),
    ],
)
def test_what_cannot_be_built_is_refused_without_data(override, message):
    job = config.parse(runs.JOB, "test", ("train.loss=cross_entropy", override))
    with pytest.raises(UsageError, match=re.escape(message)):
        require_buildable(job)


def test_the_command_that_packs_the_data_has_the_arguments_of_the_job(tmp_path):
    from hpc_absa.doctor.rehearsal import rehearse_job

    root = tmp_path / "my images"
    root.mkdir()
    data = f"data={{name = 'imagefolder', root = '{root}', image_size = 64, encoded = true}}"
    result = rehearse_job(config.parse(runs.JOB, "test", (data,)))
    command = f"hpc-absa data imagefolder --root '{root}' --image-size 64 --encoded"
    assert result["fix"] == command


@pytest.mark.slow
def test_doctor_checks_a_job_whose_data_is_not_packed_yet(tmp_path):
    from hpc_absa.doctor.software import check_rehearsal

    data = f"data={{name = 'cifar10', root = '{tmp_path}/cifar10'}}"
    (tmp_path / "cifar10").mkdir()
    finding = check_rehearsal(config.parse(runs.JOB, "test", (data,)))
    assert finding.status == "warning"
    assert f"hpc-absa data cifar10 --root {tmp_path}/cifar10" in finding.fix
    finding = check_rehearsal(config.parse(runs.JOB, "test", (data, "model.name=nope")))
    assert finding.status == "error"
    assert 'no model "nope"' in finding.detail


@pytest.mark.parametrize("name", odd_models.__dict__.keys() & {"Plain"})
def test_the_model_that_leaves_traces_can_be_trained(tmp_path, name):
    assert runs.train(tmp_path, *overrides(name)).kind == "done"
