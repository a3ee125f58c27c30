"""Replacements are checked in every microbatch; a model that differs there is right as well."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature import fast
from hpc_absa.curvature.operator import HessianOperator, evaluation_mode
from tests.curvature.nets import Samples, autograd_hessian


class Branching(nn.Module):
    """`branch(y, z, x)` of a convolution's output y, its normalization z, and the input x."""

    def __init__(self, branch):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 3)
        self.branch = branch
        self.norm.running_mean.uniform_(0.5, 1)
        self.norm.running_var.uniform_(0.5, 1)

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        return self.head(torch.tanh(self.branch(y, z, x)).mean((2, 3)))


def caught(y, z, x):
    try:
        return z + y if len(x) < 6 else z
    except Exception:
        return z * 2


class Leaking(Branching):
    """Returns the convolution's output in the last microbatch."""

    def forward(self, x):
        y = self.conv(x)
        z = self.norm(y)
        return self.head(torch.tanh(z).mean((2, 3))), y if len(x) < 6 else z


def scripted_sum(y, z):
    return y + z


BRANCHES = {
    "by the size of the batch": lambda y, z, x: z + y if len(x) < 6 else z,
    "by the values": lambda y, z, x: z + y if x.mean() < 0 else z,
    "normalization that is skipped": lambda y, z, x: torch.tanh(y) if len(x) < 6 else z,
    "a query of the strides": lambda y, z, x: z * y.stride(0) if len(x) < 6 else z,
    "an exception that is caught": caught,
    "in a list": lambda y, z, x: torch.cat([z, y], 1)[:, 1:4] if len(x) < 6 else z,
    "no grad": lambda y, z, x: z + y.detach() if len(x) < 6 else z,
    "always": lambda y, z, x: z + y,
}


def sample():
    inputs = torch.randn(10, 2, 4, 4, generator=torch.Generator().manual_seed(1)).double()
    inputs[6:] -= 3  # a negative mean in the second microbatch
    inputs[:6] += 3
    return Samples(inputs, torch.arange(10) % 3)


def hessian(model, loss=F.cross_entropy, **options):
    with evaluation_mode(model):
        operator = HessianOperator(
            model, loss, sample(), SerialCommunicator(), samples=10, microbatch=6, **options
        )
        return torch.stack(
            [operator.matvec(e) for e in torch.eye(operator.size).double()]
        ), operator


def expected_hessian(model, loss=F.cross_entropy):
    """By parts, because the model depends on them."""
    data = sample()
    first, second = (
        Samples(data.inputs[:6], data.targets[:6]),
        Samples(data.inputs[6:], data.targets[6:]),
    )
    parts = [autograd_hessian(model, loss, first, 6), autograd_hessian(model, loss, second, 4)]
    return 0.6 * parts[0] + 0.4 * parts[1]


@pytest.mark.parametrize("name", BRANCHES)
def test_control_flow(name):
    model = Branching(BRANCHES[name]).double()
    result, operator = hessian(model, keep_graphs=1)
    torch.testing.assert_close(result, expected_hessian(model))
    assert bool(operator.plan.folds) == (name != "always")


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_use_that_is_not_seen_gives_no_wrong_number():
    """Scripted functions are called without the mode that watches."""
    function = torch.jit.script(scripted_sum)
    model = Branching(lambda y, z, x: function(y, z) if len(x) < 6 else z).double()
    result, operator = hessian(model)
    assert operator.plan.folds
    torch.testing.assert_close(result, expected_hessian(model))
    model = Branching(lambda y, z, x: function(y, z)).double()
    result, operator = hessian(model)
    assert not operator.plan.folds
    torch.testing.assert_close(result, expected_hessian(model))


def test_a_loss_that_uses_the_output_of_a_convolution():
    def loss(outputs, targets):
        return F.cross_entropy(outputs[0], targets) + 0.1 * outputs[1].square().mean()

    model = Leaking(None).double()
    torch.testing.assert_close(hessian(model, loss)[0], expected_hessian(model, loss))


def test_a_diverged_model_gives_nan():
    model = Branching(lambda y, z, x: z).double()
    with torch.no_grad():
        model.head.bias.fill_(torch.nan)
    assert hessian(model)[0].isnan().all()


@pytest.mark.parametrize("view", [False, True])
def test_layout(view):
    """Convolutions run in channels last where the model allows it."""
    model = Branching(lambda y, z, x: z.view(len(z), -1).view(z.shape) if view else z)
    plan = fast.make_plan(model.eval(), sample().inputs.float())
    assert plan.accelerate
    assert plan.folds
    assert plan.channels_last is not view


def test_the_plan_is_made_once():
    """A model that has changed since is right as well."""
    model = Branching(lambda y, z, x: z).double()
    first = hessian(model)[1].plan
    assert first.folds
    assert hessian(model)[1].plan is first
    model.branch = lambda y, z, x: z + y
    torch.testing.assert_close(hessian(model)[0], expected_hessian(model))
    model.norm.eps = 0.1
    model.branch = lambda y, z, x: z
    torch.testing.assert_close(hessian(model)[0], expected_hessian(model))
