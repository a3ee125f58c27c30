"""Samples that are stratified by loss: what is chosen, its weights, and the bound for all data."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature import stratified
from hpc_absa.curvature.estimate import estimate_eigenvalue
from hpc_absa.curvature.loss import sample_losses
from hpc_absa.curvature.operator import (
    FunctionModel,
    HessianOperator,
    Interrupted,
    evaluation_mode,
)
from hpc_absa.curvature.sampling import stratified_scatter
from hpc_absa.curvature.stratified import STRATA, candidate_losses, stratify
from hpc_absa.curvature.twice import CurvatureError
from tests.curvature.nets import Samples, WeightedLoss, build, dense

SETTINGS = {"method": "lanczos", "microbatch": 64, "tol": 1e-3, "max_iter": 60}


def heavy(size, seed, spread=2.0):
    """Losses of which a few are far larger than the others."""
    return torch.from_numpy(np.random.default_rng(seed).lognormal(0, spread, size))


@pytest.mark.parametrize(
    "losses",
    [heavy(500, 0), heavy(500, 1) - 3, torch.zeros(500), torch.full((500,), 2.5), heavy(130, 2)],
    ids=["heavy", "negative", "zero", "equal", "few"],
)
@pytest.mark.parametrize("samples", [128, 100, 33])
def test_the_chosen_are_different_and_represent_all(losses, samples):
    chosen, strata = stratify(losses.double(), samples)
    assert len(set(chosen.tolist())) == len(chosen) == strata[-1].stop
    assert samples - STRATA <= len(chosen) <= samples
    assert len(strata) <= STRATA + 1
    assert sum(stratum.members for stratum in strata) == len(losses)
    assert all(stratum.size <= stratum.members for stratum in strata)
    assert [s.start for s in strata] == [0, *(s.stop for s in strata)][:-1]
    highest = [losses[chosen[s.start : s.stop]].max() for s in strata]
    assert highest == sorted(highest, reverse=True)


def test_large_losses_are_all_chosen_and_small_ones_have_a_limited_weight():
    losses = torch.rand(1000, generator=torch.Generator().manual_seed(0)).double() * 1e-3
    losses[37], losses[800] = 5.0, 7.0
    chosen, strata = stratify(losses, 128)
    assert chosen[:2].tolist() == [800, 37]
    weights = [stratum.members / stratum.size for stratum in strata]
    assert weights[0] == 1
    assert strata[0].size == 2
    assert max(weights) < 6 * 1000 / 128


def test_all_candidates_are_chosen_where_there_are_no_more():
    chosen, strata = stratify(heavy(64, 0), 64)
    assert sorted(chosen.tolist()) == list(range(64))
    assert all(stratum.size == stratum.members for stratum in strata)


def test_the_hessian_is_the_weighted_mean_of_the_samples():
    model, loss, sample = build("conv", 80)
    with evaluation_mode(model):
        whole = HessianOperator(model, loss, sample, SerialCommunicator(), samples=80, microbatch=9)
        chosen, strata = stratify(candidate_losses(whole), 40)
        part = sample.chosen(chosen)
        operator = HessianOperator(
            model, loss, part, SerialCommunicator(), samples=part.size, microbatch=9, strata=strata
        )
        product = operator.matvec(torch.ones(operator.size).double())
        mean_loss = operator.loss()
    expected, expected_loss = 0, 0
    for stratum in strata:
        own = Samples(*part.load(stratum.start, stratum.stop))
        share = stratum.members / 80
        expected = expected + share * dense(model, loss, own, own.size).sum(1)
        own = HessianOperator(
            model, loss, own, SerialCommunicator(), samples=own.size, microbatch=99
        )
        with evaluation_mode(model):
            expected_loss += share * own.loss()
    torch.testing.assert_close(product, expected, rtol=1e-9, atol=1e-10)
    assert mean_loss == pytest.approx(expected_loss, rel=1e-9)
    assert len(operator.bounds) == sum(-(-s.size // 9) for s in strata)


def estimates(values, losses, samples, candidates, count):
    """Of the mean of all values, each from other candidates."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        drawn = torch.randperm(len(values), generator=generator)[:candidates]
        chosen, strata = stratify(losses[drawn], samples)
        yield stratified_scatter(values[drawn][chosen], strata, candidates, len(values))


def test_the_standard_error_is_the_scatter_of_estimates():
    losses = heavy(3000, 3, 1.2)
    values = losses * torch.rand(3000, generator=torch.Generator().manual_seed(1)).double()
    found = list(estimates(values, losses, 128, 1000, 300))
    means = torch.tensor([scatter.mean for scatter in found])
    truth = float(values.mean())
    error = float((means - truth).square().mean().sqrt())
    stated = math.sqrt(np.mean([scatter.variance for scatter in found]))
    assert float(means.mean()) == pytest.approx(truth, abs=0.3 * error)
    assert 0.9 * error < stated < 1.2 * error
    assert stated < float(values.std()) / 128**0.5 / 2
    assert sum(scatter.mean + scatter.margin(1e-2) < truth for scatter in found) <= 9


def test_no_error_without_a_choice():
    losses = heavy(64, 0)
    (scatter,) = estimates(losses, losses, 64, 64, 1)
    assert scatter.standard_error == 0
    assert scatter.margin(1e-3) == 0
    assert scatter.mean == pytest.approx(float(losses.mean()))


class Problem:
    """Samples with losses `(aᵀw − s)² / 2` at w = 0, Hessians aaᵀ, and a ~ s: few have most."""

    def __init__(self, seed, spread=1.5, size=4000):
        generator = torch.Generator().manual_seed(seed)
        scale = torch.cat([torch.tensor([1.0, 0.9]), torch.full((28,), 0.3)]) ** 0.5
        factors = torch.exp(spread * torch.randn(size, 1, generator=generator))
        inputs = torch.randn(size, 30, generator=generator) * scale * factors
        self.data = Samples(inputs, factors[:, 0], size)
        self.truth = float(torch.linalg.eigvalsh(inputs.double().T @ inputs.double())[-1]) / size
        self.order = torch.randperm(size, generator=generator)
        self.model = FunctionModel(lambda p, x: x @ p, torch.zeros(30))

    @staticmethod
    def loss(outputs, targets):
        return (outputs - targets).square().mean() / 2

    def ask(self, share, candidates=1024, **options):
        pool = candidates and self.data.chosen(self.order[:candidates])
        settings = {"samples": 128, "candidates": pool, "false_growth": 1e-3} | options
        sample = self.data.chosen(self.order[: settings["samples"]])
        return estimate_eigenvalue(
            self.model, self.loss, sample, SerialCommunicator(),
            threshold=share and share * self.truth, **SETTINGS, **settings,
        ).eigenvalue  # fmt: skip


def grows(value, problem, share):
    return value.converged and value.at_most <= share * problem.truth


def test_growth_is_seen_where_a_random_sample_leaves_it_in_doubt():
    problems = [Problem(seed) for seed in range(12)]
    assert not any(grows(p.ask(0.9), p, 0.9) for p in problems)
    stratified = sum(grows(p.ask(3.0, 4000), p, 3.0) for p in problems)
    random = sum(grows(p.ask(3.0, candidates=None), p, 3.0) for p in problems)
    assert stratified >= 10
    assert random <= 6
    errors = [abs(p.ask(None, 4000).value / p.truth - 1) for p in problems]
    assert np.median(errors) < 0.1


def test_above_the_threshold_nothing_is_chosen(monkeypatch):
    """The usual decision takes no longer than it did."""
    problem = Problem(0)
    monkeypatch.setattr("hpc_absa.curvature.estimate.candidate_losses", None)
    value = problem.ask(0.01)
    assert value.stopped_above_threshold


def test_the_products_of_both_samples_are_counted():
    problem = Problem(0)
    value = problem.ask(30.0, 4000)
    reference = problem.ask(None, 4000)
    assert value.converged
    assert value.matvecs > reference.matvecs


@pytest.mark.parametrize("answers", [1, 5])
def test_the_losses_of_candidates_may_be_interrupted(monkeypatch, answers):
    calls, read = [], []
    losses = stratified.sample_losses
    monkeypatch.setattr(stratified, "sample_losses", lambda *a: read.append(1) or losses(*a))

    def poll():
        calls.append(1)
        return len(calls) == answers

    with pytest.raises(Interrupted):
        Problem(0).ask(None, 4000, poll=poll)
    assert len(calls) == answers
    assert (len(read) > 0) == (answers > 1)


class NoForwardDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def own_function(p, x):
    return NoForwardDerivative.apply(x @ p)


def batch_loss(outputs, targets):
    return outputs.sum(0).square() * 0 + (outputs - targets).square().mean() / 2


@pytest.mark.parametrize("change", ["model", "loss", "values", "few", "no more", "infinite"])
def test_without_the_curvature_of_each_sample_the_sample_is_random(change):
    problem, options = Problem(0), {}
    loss = problem.loss
    if change == "model":
        problem.model = FunctionModel(own_function, torch.zeros(30))
    elif change == "loss":
        problem.loss = lambda o, t: loss(o[:, None].squeeze(1), t) if len(o) > 1 else 1 / 0
    elif change == "values":
        options["false_growth"] = 0.5
    elif change == "few":
        options["samples"] = 24
    elif change == "no more":
        options["candidates"] = 128
    else:
        problem.data.targets[problem.order[700]] = math.inf
    found = problem.ask(1e3, **options)
    expected = problem.ask(1e3, **options | {"candidates": None})
    assert found.upper_bound is not None or change == "values"
    assert replace(found, seconds=0.0) == replace(expected, seconds=0.0)


@pytest.mark.parametrize(
    "loss",
    [
        functional.cross_entropy,
        partial(functional.cross_entropy, label_smoothing=0.1),
        nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.2),
        WeightedLoss(),
        lambda o, t: functional.cross_entropy(o, t),
        lambda o, t: (functional.cross_entropy(o, t, reduction="sum"), float(len(t))),
    ],
)
def test_the_loss_of_each_sample(loss):
    outputs, targets = torch.randn(7, 3).double(), torch.tensor([0, 1, 2, 2, 1, 0, 0])
    found = sample_losses(loss, outputs, targets, 7)
    assert found.shape == (7,)
    for i in range(7):
        own = loss(outputs[i : i + 1], targets[i : i + 1])
        own = own[0] if isinstance(own, tuple) else own
        if isinstance(loss, WeightedLoss):
            own = own * loss.weight[targets[i]]
        assert float(found[i]) == pytest.approx(float(own), rel=1e-6)
    assert getattr(loss, "reduction", "sum") == "sum"  # the loss itself is as it was


def test_the_losses_of_a_sequence_are_summed():
    outputs, targets = torch.randn(4, 3, 5).double(), torch.randint(0, 3, (4, 5))
    targets[1] = -100
    found = sample_losses(functional.cross_entropy, outputs, targets, 4)
    each = functional.cross_entropy(outputs, targets, reduction="none")
    torch.testing.assert_close(found, each.sum(1))
    assert found[1] == 0


def test_no_losses_of_samples_without_an_axis():
    with pytest.raises(CurvatureError, match="axis of samples"):
        sample_losses(functional.cross_entropy, torch.randn(8, 3), torch.zeros(8).long(), 4)
    with pytest.raises(CurvatureError, match="axis of samples"):
        sample_losses(lambda o, t: o.mean(), torch.randn(3), torch.zeros(4), 4)
