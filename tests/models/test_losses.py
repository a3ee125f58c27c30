import pytest
import torch
from torch.nn.functional import cross_entropy

from hpc_absa.errors import UsageError
from hpc_absa.models import build_loss

OUTPUTS = torch.tensor([[1.0, 2.0, 0.5], [0.0, -1.0, 3.0]])
TARGETS = torch.tensor([1, 0])


def test_cross_entropy_is_the_mean():
    expected = (
        cross_entropy(OUTPUTS[:1], TARGETS[:1]) + cross_entropy(OUTPUTS[1:], TARGETS[1:])
    ) / 2
    torch.testing.assert_close(build_loss("cross_entropy")(OUTPUTS, TARGETS), expected)


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
