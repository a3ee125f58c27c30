"""`hpc_absa.top_eigenvalue` and `spectrum` against dense Hessians of the examples' models."""

import numpy as np
import pytest
import torch
from torch import nn

import hpc_absa as absa
from tests.curvature.examples import NAMES, dense_hessian, small


@pytest.mark.parametrize("name", NAMES)
def test_the_eigenvalue_and_the_spectrum_are_those_of_the_dense_hessian(name):
    model, loss, batches = small(name)
    hessian = dense_hessian(model, loss, batches)
    eigenvalues, vectors = np.linalg.eigh(hessian)
    top = absa.top_eigenvalue(model, loss, batches, tol=1e-6, max_iter=100)
    assert top.value == pytest.approx(eigenvalues[-1], rel=1e-5)
    assert top.converged
    assert abs(top.vector.numpy() @ vectors[:, -1]) == pytest.approx(1, abs=1e-2)
    assert top.samples == sum(len(targets) for _, targets in batches)
    result = absa.spectrum(
        model, loss, batches, k=2, tol=1e-4, layers=False, trace_matvecs=45,
        density_steps=25, density_probes=1, slice_points=0,
    )  # fmt: skip
    np.testing.assert_allclose(result.top.values, eigenvalues[:-3:-1], rtol=1e-3)
    assert abs(result.trace.value - np.trace(hessian)) <= 4 * result.trace.error
    assert result.samples == top.samples
    nodes = result.density.nodes[result.density.weights > 1e-12]
    assert nodes.max() == pytest.approx(eigenvalues[-1], rel=1e-3)
    assert nodes.min() == pytest.approx(eigenvalues[0], rel=1e-3, abs=1e-6)


def test_a_loader_is_read_up_to_the_number_of_samples_and_the_model_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Dropout(0.5)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    read = []

    def loader():
        for number in range(100):
            read.append(number)
            yield torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)

    assert absa.top_eigenvalue(model, nn.CrossEntropyLoss(), loader(), samples=9).samples == 12
    assert read == [0, 1, 2]
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("loader", "message"),
    [([], "expected at least one batch"), ([{"x": 1}], r"expected batches \(inputs, targets\)")],
)
def test_a_loader_without_pairs_is_refused(loader, message):
    with pytest.raises(ValueError, match=message):
        absa.top_eigenvalue(nn.Linear(1, 1), nn.MSELoss(), loader)


def test_a_start_that_is_the_vector_of_a_smaller_eigenvalue():
    """As of an earlier call, if another eigenvalue has become the largest since."""
    model = nn.Linear(2, 1, bias=False).double()  # the loss is w₁² + 4 w₂², up to a constant
    inputs = torch.tensor([[2.0, 0.0], [0.0, 4.0]]).double() / 2**0.5
    batches = [(inputs, torch.zeros(2, 1).double())]
    start = torch.tensor([1.0, 0.0]).double()
    top = absa.top_eigenvalue(model, nn.MSELoss(), batches, start=start)
    assert top.converged
    assert top.value == pytest.approx(8)


def test_a_model_without_a_parameter_to_differentiate_by_is_refused_in_one_line():
    model = nn.Linear(2, 1).requires_grad_(False)
    batches = [(torch.ones(2, 2), torch.ones(2, 1))]
    with pytest.raises(absa.HpcAbsaError, match="none of its parameters requires grad"):
        absa.top_eigenvalue(model, nn.MSELoss(), batches)


@pytest.mark.parametrize("tol", [1e-2, 1e-4])
def test_a_small_tolerance_is_computed_without_tensorfloat32(tol):
    """As decisions are; on a GPU its products are accurate to 1e-3 only."""
    allowed = set()

    def loss(outputs, targets):
        allowed.add(torch.backends.cudnn.allow_tf32)
        return nn.functional.mse_loss(outputs, targets)

    before = torch.backends.cudnn.allow_tf32
    model, batches = nn.Linear(2, 1), [(torch.randn(4, 2), torch.zeros(4, 1))]
    absa.top_eigenvalue(model, loss, batches, tol=tol)
    absa.spectrum(
        model, loss, batches, k=1, tol=tol, layers=False, trace_matvecs=6, density_steps=2,
        density_probes=1, slice_points=0,
    )  # fmt: skip
    assert allowed == {before and tol > 2e-3}
    assert torch.backends.cudnn.allow_tf32 is before


def test_more_eigenvalues_than_products_are_refused_in_one_line():
    batches = [(torch.ones(2, 2), torch.ones(2, 1))]
    with pytest.raises(absa.HpcAbsaError, match=r"k = 61: expected at most max_iter = 60"):
        absa.spectrum(nn.Linear(2, 1), nn.MSELoss(), batches, k=61)
