"""attack, quantize and analyse on a small trained run, in this process."""

import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from hpc_absa import config
from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import CollectiveError, ExitStatus
from hpc_absa.quantization import stored
from hpc_absa.quantization.fake import Range
from hpc_absa.quantization.graph import trace
from hpc_absa.rundir import RunDir
from hpc_absa.training import analyse, attack, finetune, quantize
from hpc_absa.training.finetune import finetune_job
from hpc_absa.training.load import Source, load
from tests.training import runs

SERIAL = SerialCommunicator()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run directory with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    runs.train(folder, "train.lr=0.1", "checkpoint.keep=2", "schedule.max_batch=32")
    assert len(RunDir(folder).checkpoint_files()) == 2
    return folder


def state(path, model):
    arrays = {name: t.numpy() for name, t in model.state_dict().items() if "tracked" not in name}
    np.savez(path, **arrays)
    return path


def one_line(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("hpc-absa: ")
    assert err.count("\n") == 1
    return err


def test_a_run_directory_means_its_newest_checkpoint(run):
    newest = RunDir(run).checkpoint_files()[-1]
    loaded, named = load(Source(run), SERIAL), load(Source(newest), SERIAL)
    assert loaded.origin == named.origin == str(newest)
    for (name, a), b in zip(loaded.model.state_dict().items(), named.model.state_dict().values(),
                            strict=True):  # fmt: skip
        assert torch.equal(a, b), name
    assert loaded.attributes["epoch"] == runs.EPOCHS
    assert loaded.test_indices(10).tolist() == [0, 5, 10, 15, 20, 25, 30, 35, 40, 45]
    assert len(loaded.test_indices(None)) == len(loaded.test_indices(1000)) == 50


def test_weights_from_elsewhere(run, tmp_path):
    loaded = load(Source(run), SERIAL)
    weights = state(tmp_path / "w.npz", loaded.model)
    job = tmp_path / "job.toml"
    job.write_text(runs.JOB)
    root = str(loaded.dataset.path)
    other = load(Source(job, root, weights, mean=(0.5,), std=(0.25,)), SERIAL)
    assert torch.equal(
        other.model.state_dict()["features.0.weight"],
        loaded.model.state_dict()["features.0.weight"],
    )
    inputs, _ = other.loader.reader.read("test", np.arange(3))
    pixels = torch.from_numpy(loaded.dataset.test.images[:3] / 255.0)
    torch.testing.assert_close(inputs, ((pixels - 0.5) / 0.25).float())
    for source, match in (
        (Source(job, root), "a job file has no weights; give a checkpoint, or --weights FILE"),
        (Source(job, root, tmp_path / "no.npz"), "no such file"),
        (Source(job, root, weights, mean=(1.0, 2.0)), "--mean: 2 numbers, expected 1"),
        (Source(job, root, weights, std=(0.0,)), "--std: 0, expected positive"),
        (Source(tmp_path), "no checkpoint in this folder"),
    ):
        with pytest.raises(CollectiveError, match=match):
            load(source, SERIAL)


def test_weights_that_are_nan_are_refused(run, tmp_path, capsys):
    model = load(Source(run), SERIAL).model
    with torch.no_grad():
        next(model.parameters()).view(-1)[:2] = torch.nan
    weights = state(tmp_path / "w.npz", model)
    assert attack.attack(Source(run, weights=weights), None, False, attack.Options()) == 1
    assert "features.0.weight has 2 values that are NaN or infinite" in one_line(capsys)


def test_attack(run, tmp_path, capsys):
    options = attack.Options(
        ("fgsm", "pgd", "tr-l2-easy", "tr-linf-easy-fixed"), 40, (16.0,), radius=0.05, iterations=60
    )
    (tmp_path / "a.png").write_bytes(b"of hpc-absa")  # of a run of the command before
    assert attack.attack(Source(run), tmp_path / "a", True, options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["samples"] == 40
    results = {result["attack"]: result for result in found["results"]}
    assert list(results) == ["fgsm ε=16", "pgd ε=16", "tr-l2-easy", "tr-linf-easy-fixed"]
    for result in results.values():
        sizes, robust = np.array(result["perturbations"]), np.array(result["robust"])
        assert len(sizes) == len(robust) == 40
        assert result["mean"] == pytest.approx(sizes.mean())
        assert result["accuracy"] == robust.mean() <= found["accuracy"]
        assert result["fooled"] == pytest.approx(1 - robust.mean() / found["accuracy"])
    assert results["pgd ε=16"]["accuracy"] <= results["fgsm ε=16"]["accuracy"]
    assert results["tr-linf-easy-fixed"]["fooled"] > 0.5
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for bad, match in (
        ({"attacks": ("fgms",)}, "attack 'fgms': expected some of fgsm, .* did you mean fgsm"),
        ({"epsilons": (0.0,)}, "epsilon = 0: expected a positive number"),
        ({"epsilons": (2.0, np.nan)}, "epsilon = nan: expected a positive number"),
    ):
        assert attack.attack(Source(run), None, True, attack.Options(**bad)) == 2
        assert re.search(match, one_line(capsys))


def test_quantize(run, tmp_path, capsys):
    table = tmp_path / "latency.csv"
    table.write_text("layer,4,8\nfeatures.3,1,2\nfeatures.6,3,6\n")
    options = quantize.Options(
        limits=(("size", "0.6"), ("latency", "7.5ms")), latencies=table, samples=16, matvecs=6,
        check=3, finetune=2, lr=1e-2,
    )  # fmt: skip
    out = tmp_path / "q"
    assert quantize.quantize(Source(run), out, True, options) == 0
    found = json.loads(capsys.readouterr().out)
    names = [layer["name"] for layer in found["layers"]]
    assert names == ["features.0", "features.3", "features.6", "classifier"]
    assert found["fixed"] == ["features.0", "classifier"]
    assert found["allocation"] == {**dict.fromkeys(names, 8), "features.6": 4}
    measured = {m["name"]: m for m in found["measured"]}
    assert list(measured) == ["float32", "8 bits", "mixed", "mixed, tuned", "4 bits"]
    assert measured["8 bits"]["accuracy"] == pytest.approx(
        measured["float32"]["accuracy"], abs=0.03
    )
    assert measured["mixed"]["latency"] == 5
    assert measured["8 bits"]["size"] == measured["float32"]["size"] / 4
    assert len(found["check"]["random_losses"]) == 3
    assert found["front"]["exact"]
    written = json.loads((tmp_path / "q.json").read_text())
    assert written["layers"]["features.6"]["bits"] == 4
    assert written["torch.ao.quantization"]["features.6"]["weight"]["quant_max"] == 7
    assert (tmp_path / "q.png").read_bytes().startswith(b"\x89PNG")
    # the file is a model that a job can name, and fine-tuning was a run of it
    model = stored.network(str(tmp_path / "q.npz"))
    inputs, _ = load(Source(run), SERIAL).loader.reader.read("test", np.arange(5))
    assert model(inputs).shape == (5, 4)
    tuned = load(Source(tmp_path / "q-finetuned"), SERIAL)
    assert tuned.attributes["epoch"] == 2
    values = tuned.model.get_submodule("features.6.layer").weight.detach()
    assert not torch.equal(values, model.get_submodule("features.6.layer").weight)


def save_network(loaded, path, bits):
    """A network whose layers all have so many bits."""
    inputs, _ = loaded.loader.reader.read("test", np.arange(1))
    network = trace(loaded.model, inputs)
    names = [layer.name for layer in network.layers]
    ranges = {name: {bits: Range(0.0, 1.0)} for name in names}
    model = {"name": loaded.job.model.name, "arguments": loaded.job.model.arguments}
    stored.save(path, network, dict.fromkeys(names, bits), ranges, model, inputs.shape[1:], 4)
    return path


def regression(channels: int, classes: int = 1):
    return nn.Sequential(nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, classes))


def test_a_network_of_data_without_classes_is_built_again(tmp_path):
    network, path = trace(regression(3), torch.zeros(1, 3)), tmp_path / "q.npz"
    names = [layer.name for layer in network.layers]
    ranges = {name: {8: Range(0.0, 1.0)} for name in names}
    model = {"name": "tests.training.test_study:regression", "arguments": {}}
    stored.save(path, network, dict.fromkeys(names, 8), ranges, model, (3,), 0)
    assert stored.network(str(path))(torch.zeros(2, 3)).shape == (2, 1)


def test_fine_tuning_that_is_stopped_is_no_result(run, tmp_path, monkeypatch):
    class Asked(runs.Stop):
        def __init__(self, *_):
            super().__init__()
            self.now = True

        def close(self):
            pass

    loaded = load(Source(run), SERIAL)
    arguments = save_network(loaded, tmp_path / "q.npz", 8), tmp_path / "tuned", SERIAL, 1, 1e-3
    with monkeypatch.context() as patched:
        patched.setattr(finetune, "StopRequest", Asked)
        with pytest.raises(CollectiveError, match="stopped, everything saved") as error:
            finetune.finetune(loaded.job, *arguments)
    assert error.value.status == ExitStatus.STOPPED
    finetune.finetune(loaded.job, *arguments)
    assert runs.events(tmp_path / "tuned", "done")[0]["epochs"] == 1


def test_fine_tuning_is_not_continued_with_another_network(run, tmp_path):
    loaded, file = load(Source(run), SERIAL), tmp_path / "q.npz"
    arguments = file, tmp_path / "tuned", SERIAL, 1, 1e-3
    save_network(loaded, file, 8)
    finetune.finetune(loaded.job, *arguments)
    save_network(loaded, file, 4)
    with pytest.raises(CollectiveError, match=r"another job: model.digest = .* there, .* here"):
        finetune.finetune(loaded.job, *arguments)
    with pytest.raises(CollectiveError, match=r"q.npz: another network: its digest is"):
        load(Source(tmp_path / "tuned"), SERIAL)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"limits": (("latency", "0.5"),)}, "--latency 0.5: expected also --latency-table FILE"),
        ({"limits": (("size", "1e-3KB"),)}, "size limit 1: impossible, expected at least"),
        ({"bits": (8, 4)}, r"--bits \(8, 4\): expected two or more ascending numbers"),
        ({"finetune": 1}, "--finetune: expected also --out"),
        ({"lr": 0.0}, "--lr 0: expected a positive number"),
    ],
)
def test_what_cannot_be_quantized_is_one_line(run, capsys, settings, match):
    options = quantize.Options(samples=8, matvecs=6, **settings)
    assert quantize.quantize(Source(run), None, True, options) == 2
    assert re.search(match, one_line(capsys))


def test_fine_tuning_has_the_arguments_of_the_loss(tmp_path):
    network = tmp_path / "q.npz"
    np.savez(network, weight=np.ones(2))
    tables = {
        "name": "a",
        "data": {"name": "digits"},
        "model": {"name": "digits-cnn"},
        "train": {"epochs": 1, "microbatch": 32, "lr": 0.1},
        "loss": {"weight": [2.0] * 10},
        "schedule": {"method": "bl", "base_batch": 64},
    }
    job = config.from_tables(tables, "test")
    assert finetune_job(job, network, 1, 2, 1e-3).loss.arguments == {"weight": [2.0] * 10}


def test_fine_tuning_with_other_statistics_of_the_inputs_is_refused(run, tmp_path, capsys):
    options = quantize.Options(finetune=1)
    assert quantize.quantize(Source(run, mean=(0.5,)), tmp_path / "q", True, options) == 2
    assert "--finetune: expected none with --mean or --std" in one_line(capsys)


def test_files_of_others_are_not_replaced(run, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"a photograph")
    (tmp_path / "q.npz").write_bytes(b"weights")
    (tmp_path / "analysis.json").write_text("{}")
    assert attack.attack(Source(run), tmp_path / "a", True, attack.Options()) == 2
    assert "a.png: exists and is not of hpc-absa; choose another --out" in one_line(capsys)
    assert quantize.quantize(Source(run), tmp_path / "q", True, quantize.Options()) == 2
    assert "q.npz: exists and is not of hpc-absa" in one_line(capsys)
    assert quantize.quantize(Source(run), tmp_path / "no" / "q", True, quantize.Options()) == 2
    assert f"no folder {tmp_path}/no to write to" in one_line(capsys)
    assert analyse.analyse([run], None, tmp_path, True, analyse.Options()) == 2
    assert "analysis.json: exists and is not of hpc-absa" in one_line(capsys)


def test_sensitivities_are_of_the_layers_blocks(run):
    """The traces of the blocks of the dense Hessian, in float64."""
    loaded = load(Source(run), SERIAL)
    loaded.model.double()
    sample = loaded.training_sample(24)
    inputs, targets = sample.load(0, 24)

    class Double:
        size = 24

        def load(self, start, stop):
            return inputs[start:stop].double(), targets[start:stop]

    from hpc_absa.quantization.graph import trace
    from hpc_absa.quantization.sensitivity import sensitivities

    layers = trace(loaded.model, inputs[:1].double()).layers
    found = sensitivities(
        loaded.model, loaded.loss, Double(), SERIAL, layers[:1], (4, 8), microbatch=8, matvecs=30
    )
    weight = loaded.model.features[0].weight
    assert weight.numel() <= 30  # so that the trace is exact

    def loss(w):
        parameters = {"features.0.weight": w}
        outputs = torch.func.functional_call(loaded.model.eval(), parameters, (inputs.double(),))
        return nn.functional.cross_entropy(outputs, targets)

    size = weight.numel()
    hessian = torch.autograd.functional.hessian(loss, weight.detach()).reshape(size, size)
    (first,) = found
    assert first.trace.value == pytest.approx(float(hessian.trace()), rel=1e-9)
    assert first.omega == pytest.approx(max(first.trace.value, 0) / size * first.errors)


def test_a_frozen_layer_has_the_sensitivity_that_it_has_otherwise(run):
    from hpc_absa.quantization.graph import trace
    from hpc_absa.quantization.sensitivity import sensitivities

    loaded = load(Source(run), SERIAL)
    sample = loaded.training_sample(16)
    layers = trace(loaded.model, sample.load(0, 1)[0]).layers[:1]
    values = []
    for trained in (True, False):
        loaded.model.requires_grad_(trained)
        (found,) = sensitivities(
            loaded.model, loaded.loss, sample, SERIAL, layers, (4, 8), microbatch=8, matvecs=30
        )
        values.append(found.trace.value)
        assert all(p.requires_grad is trained for p in loaded.model.parameters())
    assert values[0] == pytest.approx(values[1])


def test_analyse(run, tmp_path, capsys):
    options = analyse.Options(
        samples=16, trace_matvecs=6, density_steps=4, surface=3, attacks=("fgsm", "pgd"),
        attack_samples=20, epsilons=(16.0,),
    )  # fmt: skip
    out = tmp_path / "analysis"
    assert analyse.analyse([run], None, out, True, options) == 0
    first = json.loads(capsys.readouterr().out)["points"]
    assert [point["epoch"] for point in first] == sorted(point["epoch"] for point in first)
    last = first[-1]
    assert last["run"] == run.name
    assert last["eigenvalues"][0] >= last["eigenvalues"][1]
    assert 0 <= last["negative"][0] <= last["negative"][2] <= 1
    assert list(last["robust"]) == ["fgsm ε=16", "pgd ε=16"]
    assert np.array(last["surface"]["losses"]).shape == (3, 3)
    assert last["surface"]["losses"][1][1] == pytest.approx(last["train_loss"], rel=1e-5)
    assert (out / "analysis.png").read_bytes().startswith(b"\x89PNG")
    before = {path: path.stat().st_mtime_ns for path in out.glob("*-step-*.json")}
    assert len(before) == 2
    assert analyse.analyse([run], None, out, True, options) == 0  # continues: nothing is computed
    assert json.loads(capsys.readouterr().out)["points"] == first
    assert {path: path.stat().st_mtime_ns for path in out.glob("*-step-*.json")} == before
    bare = analyse.Options(samples=8, trace_matvecs=6, density_steps=3, attacks=(), last=True)
    assert analyse.analyse([run], None, tmp_path / "bare", True, bare) == 0
    (point,) = json.loads(capsys.readouterr().out)["points"]
    assert (point["robust"], point["clean"]) == ({}, None)
    assert analyse.analyse([tmp_path], None, out, True, options) == 2
    assert "no checkpoint here, expected a run directory" in one_line(capsys)


def test_a_checkpoint_that_was_removed_meanwhile_is_one_line(run, tmp_path, capsys, monkeypatch):
    gone = tmp_path / "step-0000000009-phase-001.h5"
    monkeypatch.setattr(analyse, "_checkpoints", lambda *_: [("run", gone)])
    assert analyse.analyse([run], None, tmp_path / "out", True, analyse.Options()) == 1
    assert f"{gone}: cannot be read: No such file or directory; its run may" in one_line(capsys)
