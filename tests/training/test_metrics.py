"""Metrics against their definitions, over any split into batches."""

import math

import pytest
import torch
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.training import metrics
from hpc_absa.training.evaluate import evaluate

F = nn.functional
G = torch.Generator().manual_seed(0)
SCORES, CLASSES = torch.randn(60, 7, generator=G), torch.randint(7, (60,), generator=G)
TOKENS = torch.randint(7, (20, 3), generator=G).where(torch.rand(20, 3, generator=G) < 0.7, -100)
LOGITS = torch.randn(40, 5, generator=G)
LABELS = (torch.rand(40, 5, generator=G) < 0.4).float()
NUMBERS = torch.randn(30, 2, generator=G)


def value(name, outputs, targets, loss=F.cross_entropy, size=7):
    """Over batches of `size` samples, by `evaluate`."""
    model = nn.Identity()
    pairs = zip(outputs.split(size), targets.split(size), strict=True)
    batches = [((x, t), len(t)) for x, t in pairs]
    metric = metrics.build(name, loss)
    result = evaluate(model, lambda o, t: o.sum(), [metric], batches, SerialCommunicator())
    return result.metrics.get(metric.name)


def f1(true, predicted):
    tp, fp, fn = (true & predicted).sum(), (predicted & ~true).sum(), (true & ~predicted).sum()
    return float(2 * tp / (2 * tp + fp + fn))


@pytest.mark.parametrize("size", [1, 7, 100])
def test_classes(size):
    predicted = SCORES.argmax(1)
    expected = float((predicted == CLASSES).double().mean())
    assert value("accuracy", SCORES, CLASSES, size=size) == expected
    best = SCORES.topk(3).indices
    expected = sum(int(c in b) for c, b in zip(CLASSES, best, strict=True)) / 60
    assert value("top3", SCORES, CLASSES, size=size) == pytest.approx(expected)
    assert value("top5", SCORES[:, :2], CLASSES % 2, size=size) == 1.0
    each = [f1(c == CLASSES, predicted == c) for c in range(7)]
    assert value("f1", SCORES, CLASSES, size=size) == pytest.approx(sum(each) / 7)
    perplexity = math.exp(F.cross_entropy(SCORES, CLASSES))
    assert value("perplexity", SCORES, CLASSES, size=size) == pytest.approx(perplexity, rel=1e-5)


@pytest.mark.parametrize("classes_last", [True, False])
def test_tokens_that_are_ignored_do_not_count(classes_last):
    outputs = SCORES.view(20, 3, 7) if classes_last else SCORES.view(20, 3, 7).movedim(2, 1)
    kept = TOKENS.flatten() != -100
    scores, classes = SCORES[kept], TOKENS.flatten()[kept]
    expected = float((scores.argmax(1) == classes).double().mean())
    assert value("accuracy", outputs, TOKENS) == pytest.approx(expected)
    perplexity = math.exp(F.cross_entropy(scores, classes))
    assert value("perplexity", outputs, TOKENS) == pytest.approx(perplexity, rel=1e-5)
    assert value("accuracy", outputs, torch.full_like(TOKENS, -100)) is None


def test_labels():
    loss, predicted = F.binary_cross_entropy_with_logits, LOGITS > 0
    each = [f1(LABELS[:, i] > 0, predicted[:, i]) for i in range(5)]
    assert value("f1", LOGITS, LABELS, loss) == pytest.approx(sum(each) / 5)
    expected = float((predicted == LABELS.bool()).double().mean())
    assert value("accuracy", LOGITS, LABELS, loss) == pytest.approx(expected)
    probabilities = LOGITS.sigmoid()
    assert value("accuracy", probabilities, LABELS, F.binary_cross_entropy) == pytest.approx(
        expected
    )
    one, binary = LOGITS[:, :1], LABELS[:, 0].long()

    def of_one(outputs, targets):
        return loss(outputs.view(-1), targets.float())

    assert value("f1", one, binary, of_one) == pytest.approx(f1(binary > 0, one[:, 0] > 0))


def test_a_class_that_does_not_occur_is_left_out_of_f1():
    scores, classes = torch.eye(3)[[0, 1, 1]], torch.tensor([0, 1, 1])
    assert value("f1", scores, classes) == 1.0


def test_numbers():
    targets = NUMBERS.flip(0)
    expected = F.mse_loss(NUMBERS, targets).item()
    assert value("mse", NUMBERS, targets) == pytest.approx(expected)
    assert value("mae", NUMBERS, targets) == pytest.approx(F.l1_loss(NUMBERS, targets).item())
    assert value("mse", NUMBERS[:, :1], NUMBERS[:, 0]) == 0.0


def of_a_user(outputs, targets):
    return outputs.mean()


def weighted(outputs, targets):
    return (outputs * targets).sum(), targets.sum()


def test_functions_of_a_user():
    outputs, targets = NUMBERS[:, 0], NUMBERS[:, 1].abs()
    mean = value(f"{__name__}:of_a_user", outputs, targets)
    assert mean == pytest.approx(outputs.mean().item(), rel=1e-5)
    expected = ((outputs * targets).sum() / targets.sum()).item()
    assert value(f"{__name__}:weighted", outputs, targets) == pytest.approx(expected, rel=1e-5)


def test_what_is_shown():
    assert metrics.shown({"accuracy": 0.5, "f1": 1.0}, 0.1) == "accuracy 50.00%"
    assert metrics.shown({"top5": 0.5}, None) == "top5 50.00%"
    assert metrics.shown({"topics": 3.25}, None) == "topics 3.25"
    assert metrics.shown({"perplexity": 3.25}, 0.1) == "perplexity 3.25"
    assert metrics.shown({}, 0.125) == "loss 0.125"
    assert metrics.shown({}, None) == ""
