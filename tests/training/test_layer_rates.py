"""Learning rates by layer: the factors, and a run that has them."""

import pytest

from hpc_absa.training.layer_rates import factors
from tests.training import runs


def test_factors_are_bounded_and_their_curvatures_mean_is_one():
    found = factors({"a": 1.0, "b": 4.0, "c": 16.0}, bound=10.0)
    assert found == pytest.approx({"a": 2.0, "b": 1.0, "c": 0.5})
    assert factors({"a": 1.0, "b": 4.0, "c": 16.0}, bound=1.5) == pytest.approx(
        {"a": 1.5, "b": 1.0, "c": 1 / 1.5}
    )
    saddle = factors({"a": -3.0, "b": 1.0}, bound=3.0)
    assert saddle == pytest.approx({"a": 3.0, "b": 1 / 3})
    for useless in ({"a": -1.0, "b": 0.0}, {"a": float("nan"), "b": 1.0}):
        assert factors(useless, bound=3.0) == {"a": 1.0, "b": 1.0}


CHANGES = ("hessian.layer_rates=trace", "train.epochs=3", "hessian.samples=16")


def test_a_run_has_the_rates_and_continues_with_the_same_bits(tmp_path):
    whole = runs.trainer(tmp_path / "whole", *CHANGES)
    whole.train()
    first, *_ = rated = runs.events(tmp_path / "whole", "layer_rates")
    assert [event["epoch"] for event in rated] == [1, 2]
    weights = {n for n, p in whole.model.named_parameters() if p.dim() > 1}
    assert first["factors"].keys() == weights
    assert all(0.333 < f < 3.001 for event in rated for f in event["factors"].values())
    assert len(set(rated[-1]["factors"].values())) > 1
    names = {p: n for n, p in whole.model.named_parameters()}
    groups = whole.run.state.optimizer.param_groups
    rate = whole.run.state.progress.schedule.lr
    for group in groups:
        factor = rated[-1]["factors"].get(names[group["params"][0]], 1.0)
        assert group["lr"] == pytest.approx(rate * factor)
    runs.train_until(tmp_path / "parts", *CHANGES, microbatch=40)
    resumed = runs.trainer(tmp_path / "parts", *CHANGES)
    resumed.train()
    assert runs.state_bits(resumed.run.state) == runs.state_bits(whole.run.state)


def test_off_by_default(tmp_path):
    trainer = runs.trainer(tmp_path)
    assert trainer.rates is None
    assert len(trainer.run.state.optimizer.param_groups) == 1
