"""Accuracy and loss on the test set: each sample once, the same bits at any world size."""

import math
import re

import pytest
import torch
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import UsageError
from hpc_absa.training.evaluate import evaluate
from hpc_absa.training.metrics import Accuracy
from hpc_absa.training.rehearsal import require_scores

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
    pairs = zip(inputs.split(BATCH), targets.split(BATCH), strict=True)
    return [((x, t), len(t)) for x, t in pairs]


def measured(model, loss, pairs, comm=SerialCommunicator()):  # noqa: B008
    return evaluate(model, loss, [Accuracy(loss)], pairs, comm)


def test_any_number_of_ranks_gets_the_same_bits(model):
    results = []
    for size in (1, 2, 4, 16):
        comm = Simulated(size)
        for rank in range(size):
            result = measured(model, nn.functional.cross_entropy, batches()[rank::size], comm)
        results.append(result)
    assert all(result == results[0] for result in results)
    outputs = torch.cat([model.eval()(inputs) for (inputs, _), _ in batches()])
    targets = torch.cat([targets for (_, targets), _ in batches()])
    assert results[0].accuracy == int((outputs.argmax(1) == targets).sum()) / SAMPLES
    mean = nn.functional.cross_entropy(outputs, targets).item()
    assert results[0].loss == pytest.approx(mean, rel=1e-6)


def test_evaluation_does_not_change_the_model(model):
    model.train()
    model[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured(model, nn.functional.cross_entropy, batches())
    assert [module.training for module in model] == [True, False, True, True]
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


# One output for each sample

F = nn.functional
ONE_OUTPUT = {
    "logits": lambda o, t: F.binary_cross_entropy_with_logits(o.view(-1), t.float()),
    "weighted logits": lambda o, t: F.binary_cross_entropy_with_logits(
        o.view(-1), t.float(), pos_weight=torch.tensor(3.0)
    ),
    "hinge": lambda o, t: (1 - (2 * t - 1) * o.view(-1)).relu().mean(),
    "probabilities": lambda o, t: F.binary_cross_entropy(o.view(-1), t.float()),
    "squares": lambda o, t: F.mse_loss(o.view(-1), t.float()),
    "squares of signs": lambda o, t: F.mse_loss(o.view(-1), 2.0 * t - 1),
}


@pytest.mark.parametrize("name", ONE_OUTPUT)
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_one_output_is_scored_by_the_threshold_of_its_loss(name, shape):
    generator = torch.Generator().manual_seed(0)
    at_half = name in ("probabilities", "squares")
    scores = torch.rand(60, generator=generator)
    scores = scores if at_half else 4 * scores - 2
    targets = torch.randint(2, (60,), generator=generator)
    model = nn.Module()
    model.forward = lambda x: x.view(shape)  # type: ignore[method-assign]
    pairs = [((x, t), len(t)) for x, t in zip(scores.split(7), targets.split(7), strict=True)]
    result = measured(model, ONE_OUTPUT[name], pairs)
    expected = ((scores > (0.5 if at_half else 0.0)) == targets.bool()).double().mean()
    assert result.accuracy == pytest.approx(expected.item())
    assert result.loss == pytest.approx(ONE_OUTPUT[name](scores, targets).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "classes", "fits"),
    [
        ((8, 3), 3, True),
        ((8, 5), 3, True),
        ((8, 2), 3, False),
        ((8, 1), 3, False),
        ((8,), 3, False),
        ((8, 1), 2, True),
        ((8,), 2, True),
        ((4, 2), 2, False),
        ((8, 2, 2), 2, False),
        ((), 2, False),
    ],
)
def test_outputs_whose_accuracy_cannot_be_measured_are_refused(shape, classes, fits):
    def check():
        targets = torch.zeros(8, dtype=torch.int64)
        outputs = torch.zeros(shape)
        require_scores(outputs, targets, classes, "model.name = 'm:n'", "train.loss = 'm:l'")

    if fits:
        check()
    else:
        with pytest.raises(UsageError, match=rf"m:n.*{re.escape(str(list(shape)))}.*expected one"):
            check()


def test_cross_entropy_needs_two_outputs_for_two_classes():
    targets = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(UsageError, match=r"\[8, 1\] for 8 samples of 2 classes"):
        require_scores(torch.zeros(8, 1), targets, 2, "a model", "train.loss = 'cross_entropy'")


@pytest.mark.parametrize("values", [(torch.inf, -torch.inf), (torch.nan, 1.0)])
def test_a_loss_that_is_not_finite_is_reported_as_such(model, values):
    losses = iter([torch.tensor(value) for value in values])
    result = measured(model, lambda *_: next(losses), batches()[:2])
    assert not math.isfinite(result.loss)
    assert 0 <= result.accuracy <= 1
