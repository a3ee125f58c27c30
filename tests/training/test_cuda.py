"""Jobs with data of any kind on a GPU; the optimizers' updates are those of a CPU."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from hpc_absa.data.datasets import Datasets, MapDataset, MapReader
from hpc_absa.training.optimizer import LAMB, LARS, AdamW
from tests.training import runs
from tests.training.runs import events
from tests.training.test_kinds import JOBS, changes

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("name", JOBS)
def test_a_gpu_measures_what_a_cpu_measures(tmp_path, name):
    losses = {}
    for device in ("cpu", "cuda"):
        workers = 1 if device == "cuda" else 0
        schedule = "schedule={method = 'bl', base_batch = 8}"
        options = (f"train.device={device}", f"data.workers={workers}", "train.epochs=2")
        job = changes(name, schedule, *options)
        runs.train(tmp_path / device, *job)
        losses[device] = [e["train_loss"] for e in events(tmp_path / device, "epoch")]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)


@pytest.mark.parametrize("kind", [AdamW, LARS, LAMB])
def test_optimizers(kind):
    weights = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3))
        inputs = torch.randn(4, 7)
        net.to(device)
        optimizer = kind(net.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            net(inputs.to(device)).square().sum().backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten().cpu() for p in net.parameters()]))
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_a_data_set_may_be_on_the_gpu():
    inputs = torch.arange(4.0, device="cuda")
    dataset = MapDataset("own", Datasets(TensorDataset(inputs)))
    reader = MapReader(dataset, 0, workers=0, device=inputs.device)
    (batch,) = reader.read("train", np.array([2, 0])).inputs
    assert torch.equal(batch, inputs[[2, 0]])
