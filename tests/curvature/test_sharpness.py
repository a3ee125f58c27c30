"""Critical sharpness against quadratic losses, where it is known."""

import math

import pytest
import torch
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.operator import Interrupted
from hpc_absa.curvature.sharpness import critical_sharpness
from tests.curvature.nets import Samples, build


def quadratic(diagonal, at):
    """A loss ½ Σ h θ² at θ = `at`: the residuals of a linear model on a diagonal sample."""
    n = len(diagonal)
    model = nn.Linear(n, 1, bias=False, dtype=torch.float64)
    model.weight.data[:] = torch.tensor(at, dtype=torch.float64)
    inputs = torch.diag((torch.tensor(diagonal, dtype=torch.float64) * n).sqrt())
    sample = Samples(inputs, torch.zeros(n, 1, dtype=torch.float64))
    return model, lambda out, target: ((out - target) ** 2).mean() / 2, sample


def measure(model, loss, sample, direction=lambda gradient: gradient, **settings):
    defaults = {"samples": sample.size, "microbatch": 4, "tol": 0.01, "max_iter": 40, "guess": 0.1}
    return critical_sharpness(
        model, loss, sample, SerialCommunicator(), direction, **defaults | settings
    )


@pytest.mark.parametrize("guess", [1e-6, 0.03, 0.4, 1e5])
def test_along_an_eigenvector_it_is_the_eigenvalue(guess):
    problem = quadratic([5.0, 1.0, 0.2], [2.0, 0.0, 0.0])
    found = measure(*problem, guess=guess).eigenvalue
    assert found.converged
    assert found.value == pytest.approx(5.0, rel=0.01)


def test_along_the_gradient_it_is_the_rayleigh_quotient():
    h, at = torch.tensor([5.0, 1.0, 0.2]), torch.tensor([0.3, 1.0, -2.0])
    g = h * at
    found = measure(*quadratic(h.tolist(), at.tolist())).eigenvalue
    assert found.value == pytest.approx(float((h * g * g).sum() / (g * g).sum()), rel=0.01)
    assert found.value < 5


def test_along_another_direction():
    """`ΔᵀHΔ / gᵀΔ`."""
    h, at, step = torch.tensor([4.0, 1.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 3.0])
    expected = float((h * step * step).sum() / (h * at * step).sum())
    problem = quadratic(h.tolist(), at.tolist())
    found = measure(*problem, direction=lambda gradient: step.to(gradient))
    assert found.eigenvalue.value == pytest.approx(expected, rel=0.01)


def test_six_passes_suffice_from_a_guess_close_by():
    problem = quadratic([5.0, 1.0], [2.0, 0.0])
    found = measure(*problem, guess=0.35, tol=0.1).eigenvalue
    assert found.matvecs <= 6
    assert found.value == pytest.approx(5.0, rel=0.05)
    assert found.residual <= 0.05


def test_a_value_above_the_threshold_is_not_refined():
    problem = quadratic([5.0, 1.0], [2.0, 0.0])
    found = measure(*problem, threshold=2.0).eigenvalue
    assert found.stopped_above_threshold
    assert not found.converged
    assert 2.0 < found.value <= 5.0
    assert found.matvecs == 1
    below = measure(*problem, threshold=6.0).eigenvalue
    assert below.converged
    assert below.value == pytest.approx(5.0, rel=0.01)
    at_it = measure(*problem, threshold=5.0).eigenvalue
    assert at_it.converged
    assert at_it.value == pytest.approx(5.0, rel=0.01)


@pytest.mark.parametrize(
    "direction",
    [
        lambda gradient: -gradient,
        lambda gradient: 0 * gradient,
        lambda gradient: gradient * math.nan,
    ],
    ids=["uphill", "zero", "nan"],
)
def test_a_direction_without_a_critical_learning_rate(direction):
    found = measure(*quadratic([5.0, 1.0], [2.0, 1.0]), direction=direction, max_iter=8).eigenvalue
    assert not found.converged
    assert math.isnan(found.value)


def test_a_loss_that_is_not_finite():
    model, _, sample = quadratic([5.0, 1.0], [2.0, 1.0])
    found = measure(model, lambda out, target: out.mean() * math.nan, sample, threshold=1.0)
    assert math.isnan(found.eigenvalue.value)
    assert not found.eigenvalue.stopped_above_threshold


def test_the_model_is_unchanged():
    model, loss, sample = build("conv")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    measure(model, loss, sample)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.grad is None for p in model.parameters())


def test_it_can_be_interrupted():
    with pytest.raises(Interrupted):
        measure(*quadratic([5.0], [2.0]), poll=lambda: True)
