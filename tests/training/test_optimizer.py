"""SGD: the arithmetic of torch's, without importing its compiler."""

import subprocess
import sys

import pytest
import torch

from hpc_absa.training.optimizer import SGD

SETTINGS = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}


@pytest.mark.parametrize("settings", [{"lr": 0.1}, SETTINGS, {**SETTINGS, "nesterov": True}])
def test_weights_have_the_same_bits_as_with_torch(settings):
    def trained(kind):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
        optimizer = kind(model.parameters(), **settings)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(4, 7)).square().sum().backward()
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert torch.equal(trained(SGD), trained(torch.optim.SGD))


def test_torchs_compiler_is_not_imported():
    code = (
        "import sys, torch; from hpc_absa.training.optimizer import SGD;"
        "p = torch.ones(3, requires_grad=True); o = SGD([p], lr=0.1, momentum=0.9);"
        "p.sum().backward(); o.step(); o.zero_grad(); o.load_state_dict(o.state_dict());"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
