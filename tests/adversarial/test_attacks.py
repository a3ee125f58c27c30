"""PGD and the trust-region attack on models whose answer is known."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hpc_absa.adversarial import attacks
from hpc_absa.adversarial.attacks import pgd, trust_region
from hpc_absa.errors import UsageError

EVERYWHERE = torch.tensor(-torch.inf), torch.tensor(torch.inf)


@pytest.fixture
def linear():
    """A linear classifier of 12 inputs and 4 classes in float64, inputs and its predictions."""
    torch.manual_seed(0)
    model = nn.Linear(12, 4).double()
    inputs = torch.randn(30, 12).double()
    return model, inputs, model(inputs).argmax(1)


def boundary(model, inputs, targets, norm):
    """Gaps and distances to the boundary with each other class, [n, 4]; infinite for the own."""
    logits = model(inputs).detach()
    gap = logits.gather(1, targets[:, None]) - logits
    difference = model.weight.detach()[targets][:, None] - model.weight.detach()[None]
    length = torch.linalg.vector_norm(difference, 2 if norm == "l2" else 1, dim=2)
    distance = gap / length
    return distance.scatter(1, targets[:, None], torch.inf)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("hard", [False, True])
def test_one_step_crosses_a_linear_boundary(linear, norm, hard):
    """DeepFool's closed form (arXiv:1511.04599, section 2) times 1.02, and 1.02e-4."""
    model, inputs, targets = linear
    found = trust_region(
        model, inputs, targets, EVERYWHERE, norm=norm, hard=hard, adaptive=False, radius=100.0
    )
    distance = boundary(model, inputs, targets, norm)
    if hard:
        distance = distance.masked_fill(distance.isinf(), -torch.inf).amax(1)
    else:
        distance = distance.amin(1)
    moved = attacks._length(found.inputs - inputs, norm)
    torch.testing.assert_close(moved, 1.02 * (distance + 1e-4))
    assert found.updates.tolist() == [1] * len(inputs)
    if not hard:
        assert (model(found.inputs).argmax(1) != targets).all()


def test_a_linear_model_predicts_its_fall_so_the_radius_grows(linear):
    """ρ = 1 up to the 2 % that a step is longer: the radius is 1.2 times as large each time."""
    model, inputs, targets = linear
    distance = boundary(model, inputs, targets, "l2").amin(1)
    found = trust_region(model, inputs, targets, EVERYWHERE, radius=0.01)
    for far, updates in zip(distance.tolist(), found.updates.tolist(), strict=True):
        steps, left, radius = 0, far, 0.01
        while left > 0:
            left -= 1.02 * (min(left, radius) + 1e-4)
            radius = min(0.05, 1.2 * radius)
            steps += 1
        assert updates == steps


def test_the_radius_shrinks_where_the_model_predicts_badly():
    """A gap that oscillates: no step lowers it by half of what its slope promises."""

    class Oscillating(nn.Module):
        def forward(self, x):
            gap = 1 + 0.02 * torch.sin(2000 * x).sum(1)
            return torch.stack([gap, torch.zeros_like(gap)], 1)

    inputs = torch.rand(20, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(20, dtype=torch.long)
    for adaptive, shortest, longest in ((True, 0, 1e-3), (False, 0.01, 0.05)):
        runs = [
            trust_region(Oscillating(), inputs, targets, EVERYWHERE, adaptive=adaptive,
                         radius=0.02, steps=steps, classes=1).inputs
            for steps in (30, 31)
        ]  # fmt: skip
        last = attacks._length(runs[1] - runs[0], "l2")
        assert shortest < last.median() < longest


def test_wrong_samples_and_limits(linear):
    model, inputs, targets = linear
    wrong = targets.clone()
    wrong[:5] = (wrong[:5] + 1) % 4
    low, high = inputs.min() - 0.05, inputs.max() + 0.05
    for found in (
        trust_region(model, inputs, wrong, (low, high), radius=0.05),
        pgd(model, functional.cross_entropy, inputs, wrong, 0.5, (low, high)),
    ):
        assert torch.equal(found.inputs[:5], inputs[:5])
        assert found.updates[:5].tolist() == [0] * 5
        assert found.inputs.min() >= low
        assert found.inputs.max() <= high


def test_pgd_reaches_the_corner_that_a_linear_model_fears(linear):
    model, inputs, targets = linear
    epsilon = 0.01  # too small to fool
    distance = boundary(model, inputs, targets, "linf").amin(1)
    inputs, targets = inputs[distance > 0.02], targets[distance > 0.02]
    two = nn.Linear(12, 2).double()
    targets = two(inputs).argmax(1)
    gap = boundary_two(two, inputs, targets)
    keep = gap > 0.02
    inputs, targets = inputs[keep], targets[keep]
    found = pgd(two, functional.cross_entropy, inputs, targets, epsilon, EVERYWHERE)
    sign = (two.weight[1 - targets] - two.weight[targets]).sign()
    torch.testing.assert_close(found.inputs, inputs + epsilon * sign)
    ball = pgd(two, functional.cross_entropy, inputs, targets, epsilon, EVERYWHERE, norm="l2")
    size = attacks._length(ball.inputs - inputs, "l2")
    torch.testing.assert_close(size, torch.full_like(size, epsilon))


def boundary_two(model, inputs, targets):
    logits = model(inputs).detach()
    gap = logits.gather(1, targets[:, None]) - logits.gather(1, 1 - targets[:, None])
    return gap[:, 0] / (model.weight[0] - model.weight[1]).abs().sum().detach()


def test_epsilon_by_channel(linear):
    model, inputs, targets = linear
    epsilon = torch.linspace(0.001, 0.012, 12).double()
    found = pgd(model, functional.cross_entropy, inputs, targets, epsilon, EVERYWHERE)
    change = (found.inputs - inputs).abs()
    assert (change <= epsilon * (1 + 1e-9)).all()
    assert (change[found.updates > 4] >= 0.99 * epsilon).any()


def test_the_model_is_left_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(144, 3),
    )
    model[0].weight.requires_grad_(False)
    inputs = torch.randn(6, 1, 8, 8)
    targets = model.eval()(inputs).argmax(1)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = inputs.clone()
    trust_region(model, inputs, targets, EVERYWHERE, steps=3)
    pgd(model, functional.cross_entropy, inputs, targets, 0.1, EVERYWHERE, steps=3)
    assert torch.equal(inputs, given)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5
    assert all(p.grad is None for p in model.parameters())


def test_a_model_with_activation_checkpointing(linear):
    model, inputs, targets = linear

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(model, x, use_reentrant=True)

    wrapper = Checkpointed()
    wrapper.inner = model  # whose parameters are the wrapper's
    for attacked in (
        lambda net: trust_region(net, inputs, targets, EVERYWHERE, steps=3),
        lambda net: pgd(net, functional.cross_entropy, inputs, targets, 0.1, EVERYWHERE, steps=3),
    ):
        torch.testing.assert_close(attacked(wrapper).inputs, attacked(model).inputs)
    assert all(p.grad is None for p in model.parameters())


def test_what_cannot_be_attacked_is_one_line():
    model, targets = nn.Linear(3, 2), torch.zeros(4, dtype=torch.long)
    tokens = torch.zeros(4, 3, dtype=torch.long)
    with pytest.raises(UsageError, match=r"inputs are torch.int64 \(such as tokens\), expected"):
        trust_region(model, tokens, targets, EVERYWHERE)
    with pytest.raises(UsageError, match=r"the model returns \[4, 1\], expected one score per"):
        trust_region(nn.Linear(3, 1), torch.randn(4, 3), targets, EVERYWHERE)
    with pytest.raises(UsageError, match="the model returns"):
        pgd(nn.Linear(3, 1), functional.cross_entropy, torch.randn(4, 3), targets, 0.1, EVERYWHERE)
