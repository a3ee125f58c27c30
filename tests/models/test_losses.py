import pytest
import torch
from torch.nn.functional import cross_entropy

from hpc_absa import config
from hpc_absa.errors import UsageError
from hpc_absa.models import build_loss
from hpc_absa.models.losses import LOSSES

OUTPUTS = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
TARGETS = torch.tensor([1, 0])


def test_cross_entropy_is_the_mean():
    expected = (
        cross_entropy(OUTPUTS[:1], TARGETS[:1]) + cross_entropy(OUTPUTS[1:], TARGETS[1:])
    ) / 2
    torch.testing.assert_close(build_loss("cross_entropy")(OUTPUTS, TARGETS), expected)


def test_the_names_are_those_of_the_job_file():
    assert tuple(LOSSES) == config.LOSSES


def test_label_smoothing():
    loss = build_loss("cross_entropy", {"label_smoothing": 0.3})
    target = torch.full((2, 3), 0.1)
    target[[0, 1], TARGETS] = 0.8
    expected = -(target * OUTPUTS.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss(OUTPUTS, TARGETS), expected)


def test_user_defined_function_and_class(tmp_path, monkeypatch):
    text = "def scaled(outputs, targets, factor=1.0):\n    return factor * outputs.mean()\n"
    (tmp_path / "own_loss.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert build_loss("own_loss:scaled", {"factor": 3})(OUTPUTS, TARGETS) == 3 * OUTPUTS.mean()
    margin = build_loss("torch.nn:MultiMarginLoss", {"margin": 2.0})
    assert margin(OUTPUTS, TARGETS) == torch.nn.MultiMarginLoss(margin=2.0)(OUTPUTS, TARGETS)
    with pytest.raises(UsageError, match=r"loss: scaled cannot be called with .*\['fact'\]"):
        build_loss("own_loss:scaled", {"fact": 3})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("hinge", {}, 'train.loss: no loss "hinge".*Known are cross_entropy, bce_with_logits, mse'),
        ("cross_entropy", {"smoothing": 0.1}, "loss.smoothing: cross_entropy .*label_smoothing"),
        ("cross_entropy", {"label_smoothing": 1.5}, "loss.label_smoothing: 1.5, expected"),
        ("torch.nn:NoLoss", {}, 'module "torch.nn" has no "NoLoss"'),
    ],
)
def test_misuse(name, arguments, message):
    with pytest.raises(UsageError, match=message):
        build_loss(name, arguments)


# Shapes and denominators

CLASSES = torch.tensor([[0, 2, -100], [1, -100, -100]])
SCORES = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("classes_last", [True, False])
@pytest.mark.parametrize("weight", [None, [1.0, 2.0, 0.5, 3.0]])
def test_cross_entropy_of_sequences_is_a_sum_and_a_denominator(classes_last, weight):
    given = SCORES if classes_last else SCORES.movedim(2, 1)
    arguments = {} if weight is None else {"weight": weight}
    total, denominator = build_loss("cross_entropy", arguments)(given, CLASSES)
    weights = None if weight is None else torch.tensor(weight)
    expected = cross_entropy(SCORES.movedim(2, 1), CLASSES, weights)
    torch.testing.assert_close(total / denominator, expected)


def test_ignored_and_weighted_classes_of_samples():
    total, denominator = build_loss("cross_entropy", {"ignore_index": 1})(OUTPUTS, TARGETS)
    assert denominator == 1
    torch.testing.assert_close(total, cross_entropy(OUTPUTS[1:], TARGETS[1:]))
    total, denominator = build_loss("cross_entropy", {"weight": [1, 3, 1]})(OUTPUTS, TARGETS)
    assert denominator == 4
    weights = torch.tensor([1.0, 3.0, 1.0])
    torch.testing.assert_close(total / denominator, cross_entropy(OUTPUTS, TARGETS, weights))
    with pytest.raises(IndexError):  # never ignored silently
        build_loss("cross_entropy")(OUTPUTS, torch.tensor([1, -100]))


def test_class_weights_are_on_the_device_of_the_outputs():
    loss, outputs = build_loss("cross_entropy", {"weight": [1, 3, 1]}), OUTPUTS.to("meta")
    assert loss(outputs, outputs.softmax(1)).device.type == "meta"
    assert loss(outputs, TARGETS.to("meta"))[0].device.type == "meta"


def test_probabilities_of_three_axes_are_refused():
    """PyTorch takes the second axis for that of the classes, and sequences have it last."""
    with pytest.raises(UsageError, match=r"cross_entropy: probabilities \[2, 3, 4\], expected"):
        build_loss("cross_entropy")(SCORES, SCORES.softmax(2))


@pytest.mark.parametrize("name", ["mse", "l1", "huber", "bce_with_logits"])
def test_one_number_for_each_sample_is_compared_with_its_own_target(name):
    """Not with those of all samples, as broadcasting would."""
    outputs, targets = torch.tensor([[0.5], [-1.0], [2.0]]), torch.tensor([1, 0, 1])
    loss = build_loss(name)
    each = [loss(outputs[i : i + 1], targets[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(loss(outputs, targets), torch.stack(each).mean())
    with pytest.raises(UsageError, match=rf"{name}: outputs \[3, 1\] and targets \[3, 2\]"):
        loss(outputs, torch.zeros(3, 2))
