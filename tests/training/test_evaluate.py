"""The test set's accuracy and loss: every image once, the same bits at any world size."""

import pytest
import torch
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.training.evaluate import evaluate

IMAGES, BATCH = 103, 8


class Played(SerialCommunicator):
    """A rank whose gathering is done by the test."""

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
    inputs, targets = torch.randn(IMAGES, 4) * 10, torch.randint(3, (IMAGES,))
    return list(zip(inputs.split(BATCH), targets.split(BATCH), strict=True))


def test_the_same_bits_for_any_number_of_ranks(model):
    results = []
    for size in (1, 2, 4, 16):
        comm = Played(size)
        for rank in range(size):
            found = evaluate(model, nn.functional.cross_entropy, batches()[rank::size], comm)
        results.append(found)
    assert len(set(results)) == 1
    outputs = torch.cat([model.eval()(inputs) for inputs, _ in batches()])
    targets = torch.cat([targets for _, targets in batches()])
    assert results[0].accuracy == int((outputs.argmax(1) == targets).sum()) / IMAGES
    mean = nn.functional.cross_entropy(outputs, targets).item()
    assert results[0].loss == pytest.approx(mean, rel=1e-6)


def test_the_model_is_left_as_it_was(model):
    model.train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluate(model, nn.functional.cross_entropy, batches(), SerialCommunicator())
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
