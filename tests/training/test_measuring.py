"""What a decision measures: samples of the estimates, their mean, critical sharpness, inputs."""

import pytest
import torch

from hpc_absa.errors import CollectiveError
from hpc_absa.training.data import Draw
from tests.training.runs import SAMPLES, Stop, events, train, trainer


@pytest.fixture(autouse=True, scope="module")
def _threads():
    """A trainer sets the number of threads of the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def decisions(folder):
    return [e for e in events(folder, "decision") if e["action"] != "finish"]


def test_estimates_on_fresh_samples_and_clamping_to_the_microbatch(tmp_path):
    overrides = ("hessian.fresh=true", "hessian.method=power", "schedule.clamp=microbatch")
    overrides += ("data.normalize=false", "schedule.kappa=9", "schedule.alpha=1e6")
    train(tmp_path, *overrides)
    values = [event["eigenvalue"] for event in decisions(tmp_path)]
    assert len(set(values)) == len(values) > 2
    assert all(event["hessian_samples"] == 32 for event in decisions(tmp_path))


def test_the_mean_of_estimates_on_disjoint_samples_is_the_first_reference(tmp_path):
    train(tmp_path, "schedule.max_estimates=4", "schedule.kappa=9", "schedule.alpha=1e6")
    first, second, *_ = decisions(tmp_path)
    assert first["hessian_samples"] == 4 * 32
    assert first["sampling_error"] > 0
    assert second["reference"] == first["eigenvalue"]


def test_a_stop_and_a_restart_between_estimates_give_the_same_run(tmp_path):
    overrides = ("hessian.fresh=true", "schedule.max_estimates=2", "schedule.kappa=2")
    train(tmp_path / "whole", *overrides)
    stopping = trainer(tmp_path / "parts", *overrides, stop=Stop(during_estimate=True))
    assert stopping.train().kind == "stopped"
    resumed = trainer(tmp_path / "parts", *overrides)
    assert resumed.train().kind == "done"
    whole, parts = (decisions(tmp_path / name) for name in ("whole", "parts"))
    assert [e["eigenvalue"] for e in whole] == [e["eigenvalue"] for e in parts]


def test_too_few_samples_for_disjoint_estimates(tmp_path):
    with pytest.raises(CollectiveError, match=r"max_estimates = 5: expected at most 4 disjoint"):
        trainer(tmp_path, "schedule.max_estimates=5")


def test_critical_sharpness_decides_in_place_of_the_eigenvalue(tmp_path):
    train(tmp_path, "hessian.method=sharpness", "schedule.kappa=9", "schedule.alpha=1e6")
    first, *_ = decisions(tmp_path)
    assert first["converged"]
    assert first["eigenvalue"] > 0
    assert 0 < first["matvecs"] <= 10


def test_inputs_that_are_not_normalized_are_pixels_from_0_to_1(tmp_path):
    loader = trainer(tmp_path, "data.normalize=false").loader
    low, high = loader.reader.input_range()
    assert (low.unique().tolist(), high.unique().tolist()) == ([0.0], [1.0])
    inputs = loader.get(0).inputs
    assert 0 <= float(inputs.min()) < float(inputs.max()) <= 1


def test_a_part_of_the_training_set_is_the_same_for_every_seed(tmp_path):
    one, other = (
        trainer(tmp_path / str(seed), "data.train_samples=40", f"seed={seed}").loader.dataset.train
        for seed in (1, 2)
    )
    assert len(one) == 40
    assert (one.images == other.images).all()
    assert len(set(one.labels.tolist())) == 4
    part = trainer(tmp_path / "test", "data.test_samples=20").loader.dataset
    assert (len(part.train), len(part.test)) == (148, 20)
    with pytest.raises(CollectiveError, match=r"test_samples = 51: expected at most the 50 test"):
        trainer(tmp_path / "too-many", "data.test_samples=51")
    with pytest.raises(CollectiveError, match=r"train_samples = 200: expected at most the 148"):
        trainer(tmp_path / "more", "data.train_samples=200")


@pytest.mark.parametrize(("samples", "bounded"), [(SAMPLES - 1, True), (10**6, False)])
def test_a_sample_that_is_the_training_set_has_no_sampling_error(tmp_path, samples, bounded):
    run = trainer(tmp_path, f"hessian.samples={samples}").run
    value = run._estimator(None, 1e6, lambda: False, Draw(0, 0)).eigenvalue
    assert value.converged
    assert (value.upper_bound is not None) == bounded
