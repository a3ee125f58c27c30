"""Precision by layer: the choice, the layers' arithmetic, and a run that has it."""

import copy
import math

import pytest
import torch
from torch import nn

from hpc_absa.errors import UsageError
from hpc_absa.training.layer_precision import LayerPrecision, least_sensitive
from tests.training import runs
from tests.training.test_layer_curvature import quadratic


@pytest.mark.parametrize(
    ("changes", "limit", "chosen"),
    [
        ({"a": 3.0, "b": 1.0, "c": 2.0}, 3.5, ("b", "c")),
        ({"a": 3.0, "b": 1.0, "c": 2.0}, 6.0, ("b", "c", "a")),
        ({"a": 3.0, "b": 1.0}, 0.5, ()),
        ({"a": 0.0, "b": math.nan}, 1.0, ()),
        ({}, 1.0, ()),
    ],
)
def test_the_least_sensitive_layers_are_chosen(changes, limit, chosen):
    assert least_sensitive(changes, limit) == chosen


class Curvature:
    """Known values in place of measured ones."""

    def __init__(self, model, **values):
        self.model, self.values = model, values

    def of(self, measure, seed):
        return self.values


def test_the_predicted_change_is_half_of_curvature_and_squared_rounding():
    curvature = quadratic()
    weight = curvature.model.weight.detach()
    rounding = (weight.bfloat16().double() - weight).square().sum().item()
    assert rounding > 0
    for limit, chosen in ((rounding, [""]), (rounding / 3, [])):
        found = LayerPrecision(curvature, "trace", limit).update(5)
        assert found["changes"] == {"": pytest.approx(1.0 / 2 * rounding)}
        assert found["bfloat16"] == chosen
    assert LayerPrecision(Curvature(curvature.model, weight=-1.0), "trace", 1.0).update(5)[
        "changes"
    ] == {"": pytest.approx(rounding / 2)}
    for value in (math.nan, math.inf):
        found = LayerPrecision(Curvature(curvature.model, weight=value), "trace", 1.0).update(5)
        assert (found["changes"], found["bfloat16"]) == ({"": None}, [])


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def test_only_chosen_layers_compute_in_bfloat16():
    model = Net()
    precision = LayerPrecision(Curvature(model), "trace", 1.0)
    inputs = torch.randn(4, 6)
    plain = model(inputs)
    precision.load_state_dict({"bfloat16": ["2"]})
    assert precision.state_dict() == {"bfloat16": ["2"]}
    with precision.autocast():
        mixed = model(inputs)
    first, last = model[0], model[2]
    hidden = torch.relu(first(inputs)).bfloat16()
    expected = nn.functional.linear(hidden, last.weight.bfloat16(), last.bias.bfloat16())
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, expected.float())
    assert not torch.equal(mixed, plain)
    mixed.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters())
    assert torch.equal(model(inputs), plain), "outside it stays as it was"
    assert torch.equal(copy.deepcopy(model)(inputs), plain)


def test_layers_whose_forward_pass_is_another_are_not_chosen_from():
    model = nn.TransformerEncoderLayer(4, 2, 8)
    model.linear2.forward = model.linear2.forward
    assert set(LayerPrecision(Curvature(model), "trace", 1.0)._layers) == {"linear1"}


CHANGES = ("hessian.layer_precision=trace", "train.epochs=3", "hessian.samples=16")


def test_a_run_has_the_layers_and_continues_with_the_same_bits(tmp_path):
    every = runs.trainer(tmp_path / "every", *CHANGES, "hessian.layer_precision_limit=1e9")
    every.train()
    first, *_ = runs.events(tmp_path / "every", "layer_precision")
    assert len(first["bfloat16"]) == len(first["changes"])
    limit = sum(sorted(first["changes"].values())[:2])
    changes = (*CHANGES, f"hessian.layer_precision_limit={limit * 1.01}")
    whole = runs.trainer(tmp_path / "whole", *changes)
    whole.train()
    first, *_ = chosen = runs.events(tmp_path / "whole", "layer_precision")
    assert [event["epoch"] for event in chosen] == [1, 2]
    assert len(first["bfloat16"]) == 2
    runs.train_until(tmp_path / "parts", *changes, microbatch=40)
    resumed = runs.trainer(tmp_path / "parts", *changes)
    assert list(resumed.precision.chosen) == chosen[-1]["bfloat16"]
    resumed.train()
    bits = [runs.state_bits(trainer.run.state) for trainer in (resumed, whole, every)]
    assert bits[0] == bits[1]
    assert bits[1]["model/classifier.weight"] != bits[2]["model/classifier.weight"]


def test_off_by_default(tmp_path):
    trainer = runs.trainer(tmp_path)
    assert trainer.precision is None
    assert not trainer.run.state.others


def test_not_together_with_bfloat16_for_all_layers(tmp_path):
    with pytest.raises(UsageError, match=r"layer_precision = 'trace': expected train.precision"):
        runs.trainer(tmp_path, *CHANGES, "train.precision=bfloat16")
