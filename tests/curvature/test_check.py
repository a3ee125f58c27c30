"""The check before training: what has no second derivative, or a wrong one, is named."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from hpc_absa.curvature.check import check_curvature
from hpc_absa.curvature.fast import Arguments
from hpc_absa.curvature.twice import CurvatureError
from tests.curvature.nets import Samples, build


class Right(torch.autograd.Function):
    """`exp(x)`."""

    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Once(Right):
    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0]


class Constant(torch.autograd.Function):
    """Its backward hides what its gradient depends on; the Hessian stays symmetric."""

    @staticmethod
    def forward(ctx, x):
        ctx.y = x.detach().exp()
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return g * ctx.y


class Detached(Right):
    """Its backward detaches the gradient by its output."""

    @staticmethod
    def backward(ctx, g):
        return g.detach() * ctx.saved_tensors[0]


class Reversed(torch.autograd.Function):
    """Not the gradient of any function."""

    @staticmethod
    def forward(ctx, x):
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        return -g


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(self.function(self.a(x)))


def sample(targets=None):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 4, generator=generator)
    return Samples(inputs, torch.arange(12) % 3 if targets is None else targets)


def check(model, loss=F.cross_entropy, data=None, microbatch=6):
    check_curvature(model, loss, data or sample(), microbatch=microbatch)


@pytest.mark.parametrize("kind", ["conv", "attention", "mlp"])
def test_usual_models_pass(kind):
    model, loss, data = build(kind, dtype=torch.float32)
    flags = [module.training for module in model.modules()]
    check(model, loss, data)
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize(
    "function", [Right.apply, F.hardsigmoid, F.hardswish, torch.relu, lambda x: F.rrelu(x)]
)
def test_functions_with_a_second_derivative_pass(function):
    torch.manual_seed(0)
    check(Applied(function))


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

    def forward(self, x):
        return (x.cfloat() @ self.weight).abs()


def scripted():
    with pytest.deprecated_call():
        return nn.Sequential(torch.jit.script(nn.Linear(4, 3)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Applied(Once.apply), r"cannot be differentiated twice \(Once\)"),
        (lambda: Applied(Constant.apply), r"custom autograd function \(Constant\)"),
        (lambda: Applied(Reversed.apply), r"custom autograd function \(Reversed\)"),
        (lambda: Applied(Detached.apply), "not symmetric"),
        (Complex, "parameter weight is complex.*view_as_real"),
        (scripted, "0 is a TorchScript module"),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.LazyLinear(3)), "1.weight has no shape yet"),
        (
            lambda: Applied(
                lambda x: F.embedding_bag(
                    torch.zeros(6, 1, dtype=torch.int64), x[:5], mode="max"
                )[: len(x)]
            ),
            "calls embedding_bag, which torch cannot differentiate twice",
        ),
    ],
)  # fmt: skip
def test_others_are_refused_in_one_line(make, message):
    torch.manual_seed(0)
    with pytest.raises(CurvatureError, match=message) as caught:
        check(make())
    assert "\n" not in str(caught.value)


def test_a_loss_without_second_derivative_is_named():
    targets = torch.tensor([[0, 1, -1]] * 12)
    with pytest.raises(CurvatureError, match="calls multilabel_margin_loss"):
        check(Applied(torch.tanh), F.multilabel_margin_loss, sample(targets))


class WithLoss(nn.Module):
    """Returns its loss, as many language models do."""

    def __init__(self, reduction):
        super().__init__()
        self.net, self.reduction = Applied(torch.tanh), reduction

    def forward(self, x, labels):
        return {"loss": F.cross_entropy(self.net(x), labels, reduction=self.reduction)}


class Labelled(Samples):
    def load(self, start, stop):
        inputs, targets = super().load(start, stop)
        return Arguments((inputs,), {"labels": targets}), None


def test_a_loss_that_the_model_computes():
    data = Labelled(sample().inputs, sample().targets)
    check(WithLoss("mean"), lambda o, t: o["loss"], data)
    with pytest.raises(CurvatureError, match="not a mean over samples"):
        check(WithLoss("sum"), lambda o, t: o["loss"], data)


def test_what_costs_more_is_told():
    model, loss, text = build("attention", dtype=torch.float32)
    (note,) = check_curvature(model, loss, text, microbatch=6)
    assert "attention runs by plain operations" in note
    assert check_curvature(*build("mlp"), microbatch=6) == []
