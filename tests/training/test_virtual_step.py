"""The update that an optimizer would make, found without making it."""

import copy

import pytest
import torch
from torch import nn

from hpc_absa.training.optimizer import SGD
from hpc_absa.training.virtual_step import update_direction


def two_rates(parameters):
    first, *others = parameters
    return SGD([{"params": [first]}, {"params": others, "lr": 0.02}], lr=0.1, momentum=0.9)


OPTIMIZERS = {
    "sgd": lambda p: SGD([{"params": list(p), "weight_decay": 0.1}], lr=0.1, momentum=0.9),
    "torch-sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "two-rates": two_rates,
}


def net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].bias.requires_grad_(False)
    return model


def flat(model):
    return torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad])


def train(model, optimizer, steps):
    for k in range(steps):
        torch.manual_seed(k)
        optimizer.zero_grad()
        model(torch.randn(5, 3, dtype=torch.float64)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [0, 3])
def test_it_is_the_next_step_and_changes_nothing(name, steps):
    model = net()
    optimizer = OPTIMIZERS[name](p for p in model.parameters() if p.requires_grad)
    train(model, optimizer, steps)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradient = torch.arange(1.0, 1.0 + sum(p.numel() for p in parameters), dtype=torch.float64)
    gradients = [p.grad for p in parameters]
    before = flat(model)
    known = [p for p in parameters if p in optimizer.state]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in known]
    direction = update_direction(model, optimizer, gradient)

    assert torch.equal(flat(model), before)
    assert [p.grad for p in parameters] == gradients
    assert optimizer.param_groups[0]["lr"] == 0.1
    now = [optimizer.state[p] for p in parameters if p in optimizer.state]
    assert len(now) == len(state)
    for old, new in zip(state, now, strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old | new)

    for p, piece in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)
    optimizer.step()
    assert torch.allclose(before - flat(model), 0.1 * direction, rtol=1e-9)


def test_the_gradient_is_clipped_as_in_a_step():
    model = net()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = SGD(parameters, lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    gradient = torch.arange(1.0, 1.0 + sum(p.numel() for p in parameters), dtype=torch.float64)
    before, given = flat(model), gradient.clone()
    direction = update_direction(model, optimizer, gradient, max_grad_norm=0.5)
    assert torch.equal(gradient, given)
    for p, piece in zip(parameters, gradient.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)
    nn.utils.clip_grad_norm_(parameters, 0.5)
    optimizer.step()
    assert torch.allclose(before - flat(model), 0.1 * direction, rtol=1e-9)


class Nested(torch.optim.Optimizer):
    """Its state has a list and a dictionary in it."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["sums"], state["counts"] = [torch.zeros_like(p)], {"steps": 0}
                state["sums"][0].add_(p.grad)
                state["counts"]["steps"] += 1
                p.sub_(state["sums"][0], alpha=group["lr"])


def test_a_nested_state_is_not_changed():
    model = net()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = Nested(parameters)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    update_direction(model, optimizer, torch.ones(sum(p.numel() for p in parameters)).double())
    after = optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)
