"""AdaHessian: the diagonal, the step, and the state."""

import copy

import pytest
import torch
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import UsageError
from hpc_absa.training.adahessian import AdaHessian, StepDiagonal


def quadratic(matrix, x):
    return 0.5 * x @ matrix @ x


def test_a_diagonal_hessian_gives_its_diagonal_and_a_newton_step():
    diagonal = torch.tensor([1.0, 5.0, 0.25]).double()
    x = torch.tensor([3.0, -2.0, 8.0]).double().requires_grad_()
    optimizer = AdaHessian([x], lr=1.0, betas=(0.0, 0.0), eps=0.0)
    loss = quadratic(torch.diag(diagonal), x)
    optimizer.estimate(loss)
    assert torch.equal(optimizer.state[x]["hessian_diagonal"], diagonal)
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(x.detach(), torch.zeros(3).double())


def test_the_mean_of_the_products_tends_to_the_diagonal():
    """With the variance `Σ_{j≠i} H_ij²` of each."""
    torch.manual_seed(0)
    matrix = torch.randn(6, 6).double()
    matrix = matrix + matrix.T
    x = torch.randn(6).double().requires_grad_()
    optimizer = AdaHessian([x])
    draws = []
    for steps in range(1500):
        optimizer.state[x] = {"step": torch.tensor(float(steps))}
        (z,) = optimizer.signs()
        draws.append(z * (matrix @ z))
    found = torch.stack(draws)
    variance = matrix.square().sum(1) - matrix.diagonal().square()
    error = (variance / len(draws)).sqrt()
    assert ((found.mean(0) - matrix.diagonal()).abs() < 4.5 * error).all()
    torch.testing.assert_close(found.var(0), variance, rtol=0.2, atol=0)


def test_power_0_is_momentum():
    x = torch.tensor([1.0, -2.0]).double().requires_grad_()
    y = x.detach().clone().requires_grad_()
    optimizer = AdaHessian([x], lr=0.1, betas=(0.9, 0.999), eps=0.25, hessian_power=0.0)
    mean = torch.zeros(2).double()
    for step in range(1, 4):
        loss = quadratic(torch.diag(torch.tensor([1.0, 3.0]).double()), x)
        optimizer.estimate(loss)
        x.grad = None
        loss.backward()
        mean = 0.9 * mean + 0.1 * x.grad
        optimizer.step()
        y = y - 0.1 / 1.25 * mean / (1 - 0.9**step)
    torch.testing.assert_close(x, y)


def test_the_step_is_the_papers():
    torch.manual_seed(0)
    w = torch.randn(3, 2, 2, 2).double().requires_grad_()
    before = w.detach().clone()
    optimizer = AdaHessian([w], lr=0.3, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1,
                           hessian_power=0.5)  # fmt: skip
    mean = square = torch.zeros_like(before)
    expected = before
    for step in (1, 2):
        loss = (w**4).sum()
        optimizer.estimate(loss)
        w.grad = None
        loss.backward()
        gradient = 4 * expected**3
        diagonal = (12 * expected**2).mean((2, 3), keepdim=True)  # spatial averaging
        mean = 0.8 * mean + 0.2 * gradient
        square = 0.9 * square + 0.1 * diagonal**2
        root = (square / (1 - 0.9**step)).sqrt()
        update = mean / (1 - 0.8**step) / (root**0.5 + 1e-2) + 0.1 * expected
        expected = expected - 0.3 * update
        optimizer.step()
    torch.testing.assert_close(w.detach(), expected)


def test_rows_are_averaged_on_request():
    w = torch.arange(6.0).view(2, 3).requires_grad_()
    for rows, expected in ((False, [[0, 12, 48], [108, 192, 300]]), (True, [[20] * 3, [200] * 3])):
        optimizer = AdaHessian([w], average_rows=rows)
        optimizer.estimate((w**4).sum())
        assert optimizer.state[w]["hessian_diagonal"].tolist() == expected


def test_the_sum_over_ranks_comes_before_the_absolute_value():
    x = torch.zeros(2, requires_grad=True)
    optimizer = AdaHessian([x])
    other = torch.tensor([-3.0, 1.0])  # the other rank's part of the Hessian's diagonal
    (z,) = optimizer.signs()
    optimizer.estimate((x**2).sum(), allreduce=lambda product: product + z * other)
    assert optimizer.state[x]["hessian_diagonal"].tolist() == [1, 3]


def test_the_diagonal_is_estimated_every_so_many_steps():
    x = torch.ones(2, requires_grad=True)
    optimizer = AdaHessian([x], lr=0.01, hessian_every=3)
    due = []
    for _ in range(7):
        due.append(optimizer.due)
        loss = (x**2).sum()
        if optimizer.due:
            optimizer.estimate(loss)
        x.grad = None
        loss.backward()
        optimizer.step()
    assert due == [True, False, False, True, False, False, True]


def test_a_restored_optimizer_continues_with_the_same_bits():
    def advance(model, optimizer, steps):
        for _ in range(steps):
            loss = model(torch.linspace(-1, 1, 12).view(3, 4)).square().sum()
            if optimizer.due:
                optimizer.estimate(loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    optimizer = AdaHessian(model.parameters(), lr=0.1, hessian_every=2)
    advance(model, optimizer, 3)
    other = copy.deepcopy(model)
    restored = AdaHessian(other.parameters(), lr=0.1, hessian_every=2)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(model, optimizer, 4)
    advance(other, restored, 4)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "settings", [{"betas": (1.0, 0.9)}, {"hessian_power": 2}, {"hessian_every": 0}, {"eps": -1}]
)
def test_values_out_of_range(settings):
    with pytest.raises(UsageError, match=rf"optimizer\.{next(iter(settings))}: "):
        AdaHessian([torch.zeros(1, requires_grad=True)], **settings)


class Loader:
    """Microbatches of 4 samples by index."""

    def get(self, k):
        generator = torch.Generator().manual_seed(k)
        inputs = torch.randn(4, 1, 6, 6, generator=generator).double()
        return type("Microbatch", (), {"inputs": inputs, "targets": torch.arange(4) % 3})


def test_the_diagonal_of_a_step_is_of_its_microbatches_in_training_mode():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    ).double()
    loss = nn.functional.cross_entropy
    vectors = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    groups = [{"params": matrices}, {"params": vectors}]  # not the model's order
    optimizer = AdaHessian(groups)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step = StepDiagonal(model, loss, Loader(), SerialCommunicator(), 4, reproducible=False)
    for microbatches in (range(3), range(3, 6), range(6, 7)):
        step.estimate(optimizer, microbatches)
        assert model.training
        assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
        parts = (Loader().get(k) for k in microbatches)
        clone = copy.deepcopy(model)
        pairs = dict(zip(model.parameters(), clone.parameters(), strict=True))
        expected = AdaHessian([{"params": [pairs[p] for p in g["params"]]} for g in groups])
        expected.estimate(sum(loss(clone(m.inputs), m.targets) for m in parts) / len(microbatches))
        for parameter, other in pairs.items():
            torch.testing.assert_close(
                optimizer.state[parameter]["hessian_diagonal"],
                expected.state[other]["hessian_diagonal"],
            )
