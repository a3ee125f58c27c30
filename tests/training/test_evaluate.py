"""Accuracy and loss on the test set: each sample once, the same bits at any world size."""

import pytest
import torch
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.training.evaluate import evaluate

SAMPLES, BATCH = 103, 8


class Simulated(SerialCommunicator):
    """Ranks that run one after the other; the last one has gathered all shares."""

    def __init__(self, size):
        self.size, self.shares = size, []

    def allgather_object(self, value):
        self.shares.append(value)
        return self.shares


@pytest.fixture(name="model")
def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def batches():
    torch.manual_seed(1)
    inputs, targets = torch.randn(SAMPLES, 4) * 10, torch.randint(3, (SAMPLES,))
    return list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))


def test_any_number_of_ranks_gets_the_same_bits(model):
    results = []
    for size in (1, 2, 4, 16):
        comm = Simulated(size)
        for rank in range(size):
            result = evaluate(model, nn.functional.cross_entropy, batches()[rank::size], comm)
        results.append(result)
    assert len(set(results)) == 1
    outputs = torch.cat([model.eval()(inputs) for inputs, _ in batches()])
    targets = torch.cat([targets for _, targets in batches()])
    assert results[0].accuracy == int((outputs.argmax(1) == targets).sum()) / SAMPLES
    mean = nn.functional.cross_entropy(outputs, targets).item()
    assert results[0].loss == pytest.approx(mean, rel=1e-6)


def test_evaluation_does_not_change_the_model(model):
    model.train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, nn.functional.cross_entropy, batches(), SerialCommunicator())
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
