"""Optimizers by name: torch's arithmetic without its compiler, LARS, LAMB, and a user's class."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from hpc_absa import config
from hpc_absa.errors import UsageError
from hpc_absa.training.optimizer import LAMB, LARS, SGD, AdamW, build
from tests.training import runs
from tests.training.runs import state_bits

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
ADAMW = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}


@pytest.mark.parametrize(
    ("ours", "theirs", "settings"),
    [
        (SGD, torch.optim.SGD, {"lr": 0.1}),
        (SGD, torch.optim.SGD, SETTINGS),
        (SGD, torch.optim.SGD, {**SETTINGS, "nesterov": True}),
        (AdamW, torch.optim.AdamW, {"lr": 0.01}),
        (AdamW, torch.optim.AdamW, {**ADAMW, "amsgrad": True}),
    ],
)
def test_weights_have_the_same_bits_as_with_torch(ours, theirs, settings):
    def trained(kind):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
        optimizer = kind(model.parameters(), **settings)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 7)).square().sum().backward()
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(ours), trained(theirs))


def test_torchs_compiler_is_not_imported():
    code = (
        "import sys, torch; from hpc_absa.training.optimizer import SGD, AdamW;"
        "p = torch.ones(3, requires_grad=True); p.sum().backward();"
        "s = [SGD([p], lr=0.1, momentum=0.9), AdamW([p], lr=0.1)];"
        "[(o.step(), o.load_state_dict(o.state_dict())) for o in s]; s[0].zero_grad();"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# LARS and LAMB against their papers, written out in float64


def lars(weights, gradients, rate, momentum, decay, trust):
    velocity = np.zeros_like(weights)
    for g in gradients:
        local = 1.0
        if weights.ndim > 1:
            size = np.linalg.norm(weights)
            local = trust * size / (np.linalg.norm(g) + decay * size)
        velocity = momentum * velocity + rate * local * (g + decay * weights)
        weights = weights - velocity
    return weights


def lamb(weights, gradients, rate, betas, eps, decay):
    m = v = np.zeros_like(weights)
    for t, g in enumerate(gradients, 1):
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        r = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps) + decay * weights
        ratio = np.linalg.norm(weights) / np.linalg.norm(r) if weights.ndim > 1 else 1.0
        weights = weights - rate * ratio * r
    return weights


@pytest.mark.parametrize("shape", [(4, 3), (5,), (2, 3, 3, 3)])
def test_lars_and_lamb_are_those_of_the_papers(shape):
    random = np.random.default_rng(0)
    start, gradients = random.normal(size=shape), random.normal(size=(6, *shape))
    for kind, settings, expected in (
        (
            LARS,
            {"momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.02},
            lars(start, gradients, 0.5, 0.9, 0.01, 0.02),
        ),
        (
            LAMB,
            {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.05},
            lamb(start, gradients, 0.5, (0.8, 0.9), 1e-6, 0.05),
        ),
    ):
        parameter = nn.Parameter(torch.tensor(start))
        optimizer = kind([parameter], lr=0.5, **settings)
        for gradient in gradients:
            parameter.grad = torch.from_numpy(gradient)
            optimizer.step()
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("kind", [LARS, LAMB])
def test_weights_and_gradients_that_are_zero_give_no_nan(kind):
    weights = [nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))]
    for weight, gradient in zip(weights, (torch.ones(2, 2), torch.zeros(2, 2)), strict=True):
        weight.grad = gradient
    kind(weights, lr=0.1).step()
    assert all(w.isfinite().all() for w in weights)


# In a job


def job(*overrides):
    return config.parse(runs.JOB, "test", overrides)


def built(*overrides):
    settings = job(*overrides)
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    return build(settings.train, settings.optimizer.arguments, net, lr=settings.train.lr)


class Mine(torch.optim.Adagrad):
    """A user's optimizer."""


class TwoRates(torch.optim.SGD):
    """One with groups of its own, as for a new head on a network that was trained before."""

    def __init__(self, groups, lr, weight_decay=0.0):
        *body, head = [parameter for group in groups for parameter in group["params"]]
        super().__init__(
            [{"params": body}, {"params": head, "lr": 10 * lr}], lr=lr, weight_decay=weight_decay
        )


def test_optimizers_by_name():
    nesterov = built("optimizer.nesterov=true")
    assert type(nesterov) is SGD
    assert nesterov.defaults["nesterov"]
    assert nesterov.defaults["momentum"] == 0.9
    adamw = built("train.optimizer=adamw", "optimizer.betas=[0.8, 0.9]")
    assert type(adamw) is AdamW
    assert adamw.defaults["betas"] == (0.8, 0.9)
    spared = built("train.optimizer=lamb", "train.no_decay_norm_bias=true")
    assert [group["weight_decay"] for group in spared.param_groups] == [1e-3, 0.0]
    mine = built(f"train.optimizer={__name__}:Mine", "optimizer.lr_decay=0.5")
    assert type(mine) is Mine
    assert mine.defaults["lr_decay"] == 0.5
    own = built(f"train.optimizer={__name__}:TwoRates")
    assert [group["lr"] / own.defaults["lr"] for group in own.param_groups] == [1, 10]
    assert [group["weight_decay"] for group in own.param_groups] == [1e-3, 1e-3]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.optimizer=adm"], r"optimizer = 'adm': expected one of sgd, adamw, lars, lamb, ad"),
        (["train.optimizer=adamw", "train.momentum=0.5"], r"momentum = 0.5: expected none with"),
        (["optimizer.betas=[0, 1]"], r"optimizer.betas = .*: sgd has no such argument here; valid"),
        (
            ["train.optimizer=lamb", "optimizer.betas=[0.9, 2]"],
            r"train.optimizer = 'lamb' failed: ValueError: betas = \[0.9, 2\]: expected two",
        ),
        (["train.optimizer=adamw", 'optimizer.eps="x"'], r"train.optimizer = 'adamw' failed: Type"),
        (["optimizer.lr=0.1"], r"optimizer.lr = 0.1: sgd has no such argument here"),
        (["train.optimizer=torch.optim:LBFGS"], r"train.weight_decay = 0.001: expected 0, because"),
        (
            ["train.optimizer=torch.optim:LBFGS", "train.weight_decay=0.0"],
            r"torch.optim:LBFGS': its step needs a closure",
        ),
        (["train.optimizer=torch.optim:No"], r'train.optimizer: module "torch.optim" has no "No"'),
    ],
)
def test_misuse_is_one_line(overrides, message):
    with pytest.raises(UsageError, match=message) as error:
        built(*overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "optimizer", "rule"),
    [
        ("absa", "sgd", "linear"),
        ("absa", "lars", "linear"),
        ("absa", "adamw", "square-root"),
        ("fb", "lamb", "square-root"),
        ("gns", "torch.optim:NAdam", "square-root"),
        ("gns", "torch.optim:ASGD", "linear"),
        ("bl", "adamw", "none"),
        ("gg", "lamb", "none"),
    ],
)
def test_the_learning_rate_of_adam_like_optimizers_follows_the_root_of_the_batch(
    method, optimizer, rule
):
    schedule = f"schedule={{method = '{method}', base_batch = 16}}"
    settings = job(schedule, f"train.optimizer={optimizer}")
    assert settings.schedule.lr_rule == rule
    assert config.parse(config.dump(settings), "test").schedule == settings.schedule
    assert job(schedule, f"train.optimizer={optimizer}", "schedule.lr_rule=linear").schedule.lr_rule


@pytest.mark.parametrize("name", ["adamw", "lars", "lamb", "adahessian", f"{__name__}:Mine"])
def test_a_stopped_run_continues_with_the_same_bits(tmp_path, name):
    changes = (f"train.optimizer={name}", "train.epochs=2", "hessian.samples=8")
    whole = runs.trainer(tmp_path / "whole", *changes)
    whole.train()
    runs.train_until(tmp_path / "parts", *changes, microbatch=6)
    resumed = runs.trainer(tmp_path / "parts", *changes)
    resumed.train()
    assert state_bits(resumed.run.state) == state_bits(whole.run.state)
