"""Is λ of all data at most t? Answers on random samples, with the stated error rates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hpc_absa.comm import SerialCommunicator
from hpc_absa.config.tables import Hessian
from hpc_absa.curvature import pieces
from hpc_absa.curvature.directional import sample_curvatures
from hpc_absa.curvature.estimate import estimate_eigenvalue
from hpc_absa.curvature.operator import FunctionModel, HessianOperator, evaluation_mode
from hpc_absa.curvature.sampling import Scatter, student_t
from hpc_absa.schedules import SCHEDULES
from tests.curvature.nets import Samples, build

PRESETS = {
    method: Hessian(**SCHEDULES[method].hessian_defaults) for method in ("abs", "absa-tuned")
}  # those of absa are those of abs
SIZE = 60


@pytest.mark.parametrize(
    ("level", "freedom", "quantile"),
    [(0.01, 15, 2.602), (0.01, 7, 2.998), (0.05, 7, 1.895), (0.05, 15, 1.753), (0.001, 15, 3.733)],
)
def test_quantiles(level, freedom, quantile):
    assert student_t(level, freedom) == pytest.approx(quantile, rel=5e-3)


def test_no_quantile_from_one_group():
    assert student_t(0.01, 0) == student_t(0.01, 2) == math.inf
    assert math.isnan(
        Scatter.of_groups(torch.ones(1).double(), torch.ones(1).double()).standard_error
    )


def test_the_standard_error_of_a_mean():
    values = np.random.default_rng(0).normal(size=9)
    scatter = Scatter.of_groups(torch.from_numpy(values), torch.full((9,), 1 / 9).double())
    assert scatter.mean == pytest.approx(values.mean())
    assert scatter.standard_error == pytest.approx(values.std(ddof=1) / 3)
    # a group without a weight, as one with ignored targets only, does not count
    weights = torch.tensor([1 / 9] * 9 + [0.0]).double()
    more = Scatter.of_groups(
        torch.cat([torch.from_numpy(values), torch.tensor([50.0]).double()]), weights
    )
    assert more.freedom == 8
    assert more.standard_error == pytest.approx(scatter.standard_error)


def question(settings, share, seed, spread, **options):
    """The answer on one sample of a problem whose λ over all data is 1.

    The loss of a sample is `(aᵀw)² / 2`, so its Hessian is `aaᵀ`. Every `a` is normal, times a
    factor that makes a few samples far more important than others, as in trained networks.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = settings.samples
    scale = torch.cat([torch.tensor([1.0, 0.9]), torch.full((SIZE - 2,), 0.3)]) ** 0.5
    factors = torch.exp(spread * torch.randn(samples, 1, generator=generator) - spread**2)
    inputs = torch.randn(samples, SIZE, generator=generator) * scale * factors
    model = FunctionModel(lambda p, x: x @ p, torch.zeros(SIZE))
    return estimate_eigenvalue(
        model, lambda o, t: o.square().mean() / 2, Samples(inputs, inputs), SerialCommunicator(),
        method="lanczos", samples=samples, microbatch=64, tol=settings.tol,
        max_iter=settings.max_iter, threshold=share, **options,
    )  # fmt: skip


def grown(settings, share, seeds, spread):
    count = 0
    for seed in seeds:
        value = question(settings, share, seed, spread).eigenvalue
        count += value.converged and value.at_most <= share
    return count


@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("spread", [0.0, 0.7])
def test_growth_is_not_false(method, spread):
    assert grown(PRESETS[method], 0.9, range(40), spread) == 0
    assert grown(PRESETS[method], 2.0 if spread == 0 else 16.0, range(10), spread) >= 7


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", PRESETS)
@pytest.mark.parametrize("spread", [0.0, 0.4, 0.7])
def test_no_false_growth_in_1000_samples(method, spread):
    assert SCHEDULES["absa"].hessian_defaults == SCHEDULES["abs"].hessian_defaults
    assert grown(PRESETS[method], 0.9, range(1000), spread) == 0


def test_the_bound_contains_the_error_and_the_sampling_error():
    value = question(PRESETS["abs"], 8.0, 0, 0.4).eigenvalue
    assert value.converged
    margin = student_t(0.001, 255) * value.sampling_error
    assert value.upper_bound > value.value * (1 + value.error) + margin
    assert value.value < value.upper_bound <= 8.0


def test_in_doubt_it_is_not_below():
    """The value is below the threshold, its bound is not; the value has converged all the same."""
    full = question(PRESETS["abs"], 8.0, 0, 0.4).eigenvalue
    threshold = (full.value + full.upper_bound) / 2
    value = question(PRESETS["abs"], threshold, 0, 0.4).eigenvalue
    assert value.converged
    assert value.value < threshold < value.at_most


def test_the_value_itself_is_compared():
    value = question(PRESETS["abs"], 6.0, 0, 0.4, false_growth=0.5).eigenvalue
    assert value.converged
    assert value.upper_bound is None
    assert value.at_most == value.value


def test_one_group_of_samples_shows_nothing():
    settings = PRESETS["abs"].model_copy(update={"samples": 2})
    assert not question(settings, 1e3, 0, 0.0).eigenvalue.converged
    assert question(settings, None, 0, 0.0).eigenvalue.converged


def test_no_bound_without_a_threshold():
    value = question(PRESETS["abs"], None, 0, 0.4).eigenvalue
    assert value.upper_bound is None
    assert value.at_most == value.value


@pytest.fixture
def _small_pieces_are_cheap(monkeypatch):
    monkeypatch.setattr(pieces, "COARSE_BYTES", 0)


def early(seeds, share, spread):
    """Of samples whose own λ is at most `share`, how many are found above it on a part."""
    found = []
    for seed in seeds:
        value = question(PRESETS["abs"], None, seed, spread).eigenvalue
        threshold = share * value.value
        answer = question(PRESETS["abs"], threshold, seed, spread).eigenvalue
        found.append(answer.stopped_above_threshold and answer.samples < PRESETS["abs"].samples)
    return sum(found)


@pytest.mark.usefixtures("_small_pieces_are_cheap")
def test_the_test_on_a_part_of_the_sample():
    """It ends most searches far above the threshold, and few below it: 5 % at most."""
    assert early(range(12), 0.15, 0.4) >= 8
    assert early(range(30), 1.0, 0.7) <= 4


@pytest.mark.usefixtures("_small_pieces_are_cheap")
def test_what_a_part_of_the_sample_shows_is_a_lower_bound():
    """And not λ of that part, which is above λ of the whole sample as often as below it."""
    shown, above = 0, 0
    for seed in range(12):
        whole = question(PRESETS["abs"], None, seed, 0.4).eigenvalue.value
        answer = question(PRESETS["abs"], 0.15 * whole, seed, 0.4).eigenvalue
        if answer.samples < PRESETS["abs"].samples:
            assert answer.value > 0.15 * whole
            shown, above = shown + 1, above + (answer.value > whole)
    assert shown >= 8
    assert above <= 1


@pytest.mark.usefixtures("_small_pieces_are_cheap")
def test_the_previous_vector_shows_on_a_part_that_the_value_is_above():
    full = question(PRESETS["abs"], None, 0, 0.0)
    value = full.eigenvalue.value
    above = question(PRESETS["abs"], value / 3, 0, 0.0, start=full.vector)
    assert above.eigenvalue.stopped_above_threshold
    assert above.eigenvalue.samples == PRESETS["abs"].samples // 8
    assert above.samples_processed == 2 * above.eigenvalue.samples  # one product with a part
    below = question(PRESETS["abs"], 3 * value, 0, 0.0, start=full.vector).eigenvalue
    assert below.converged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_groups_of_samples_of_a_model_that_is_not_float32(dtype):
    """The vector of an estimate is float32, products of groups have the type of the model."""
    _, loss, sample = build("mlp", 24, dtype)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    hessians = pieces.Hessians(
        model.to(dtype), loss, sample, SerialCommunicator(), 24, None, False,
        pieces.Pieces(6, 6, 0, 0, False),
    )  # fmt: skip
    with evaluation_mode(model):
        vector = torch.randn(hessians.size)
        scatter, product = hessians.scatter(vector, 0, 24, 4)
    assert scatter.freedom == 3
    assert scatter.mean == pytest.approx(float(vector.to(product) @ product), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("kind", ["conv", "attention", "mlp", "recurrent"])
def test_the_curvature_of_each_sample_is_that_of_its_own_hessian(kind):
    model, loss, sample = build(kind, 12, torch.float64)
    with evaluation_mode(model):
        whole = HessianOperator(model, loss, sample, SerialCommunicator(), samples=12, microbatch=8)
        vector = whole.gradient()
        vector /= vector.norm()
        mean = float(vector @ whole.matvec(vector))
        found = sample_curvatures(whole, vector, mean)
        values = []
        for i in range(12):
            part = Samples(*sample.load(i, i + 1))
            own = HessianOperator(model, loss, part, SerialCommunicator(), samples=1, microbatch=1)
            values.append(float(vector @ own.matvec(vector)))
        assert found.tolist() == pytest.approx(values, rel=1e-9)
        assert sample_curvatures(whole, vector, 2 * mean) is None  # not the mean that is known
        weighted = HessianOperator(
            model, lambda o, t: (loss(o, t) * 3, 3), sample, SerialCommunicator(), samples=12,
            microbatch=12,
        )  # fmt: skip
        assert sample_curvatures(weighted, vector, mean) is None


def test_a_skewed_sample_has_a_larger_margin():
    weights = torch.full((64,), 1 / 64).double()
    even, values = torch.linspace(-1, 1, 64).double(), torch.zeros(64).double()
    values[0] = 8
    even = Scatter.of_groups(even * 8 / 64**0.5 / even.std(), weights)
    skewed = Scatter.of_groups(values, weights)
    assert even.skewness == pytest.approx(0, abs=1e-12)
    assert Scatter.of_groups(-values, weights).skewness == 0
    assert even.standard_error == pytest.approx(skewed.standard_error, rel=1e-6)
    assert skewed.margin(1e-3) > 1.5 * even.margin(1e-3)
