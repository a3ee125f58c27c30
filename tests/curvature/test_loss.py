"""The value does not depend on the microbatch, whatever a loss is divided by."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.estimate import estimate_eigenvalue
from hpc_absa.curvature.loss import check_mean
from hpc_absa.curvature.operator import HessianOperator, evaluation_mode
from hpc_absa.curvature.twice import CurvatureError
from tests.curvature.nets import Samples, autograd_hessian

SAMPLES = 12
WEIGHT = torch.tensor([0.2, 1.0, 3.0]).double()


def classes(ignored=False):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (SAMPLES,), generator=generator)
    targets[0] = 2
    if ignored:
        targets[:4] = -100  # a whole microbatch
        targets[6] = -100
    return targets


def numbers():
    return torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(1)).double()


def net(inputs=4, outputs=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def sample(targets):
    inputs = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(2)).double()
    return Samples(inputs, targets)


def hessian(loss, targets, microbatch, model=None, **options):
    model = model or net()
    with evaluation_mode(model):
        operator = HessianOperator(
            model, loss, sample(targets), SerialCommunicator(),
            samples=SAMPLES, microbatch=microbatch, keep_graphs=SAMPLES, **options,
        )  # fmt: skip
        rows = [operator.matvec(e) for e in torch.eye(operator.size, dtype=torch.float64)]
        return torch.stack(rows), operator


def total_and_count(outputs, targets):
    losses = F.cross_entropy(outputs, targets, ignore_index=-100, reduction="sum")
    return losses, (targets != -100).sum()


def weighted(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=WEIGHT)


def stated(outputs, targets):
    return F.cross_entropy(outputs, targets, weight=WEIGHT)


stated.denominator = lambda targets: WEIGHT[targets].sum()

# loss, targets, and what the loss of the whole sample is divided by in addition
LOSSES = {
    "cross entropy": (F.cross_entropy, classes(), 1),
    "label smoothing": (partial(F.cross_entropy, label_smoothing=0.1), classes(), 1),
    "sum": (partial(F.cross_entropy, reduction="sum"), classes(), SAMPLES),
    "sum, as a module": (nn.MSELoss(reduction="sum"), numbers(), SAMPLES),
    "class weights": (partial(F.cross_entropy, weight=WEIGHT), classes(), 1),
    "class weights, as a module": (nn.CrossEntropyLoss(weight=WEIGHT), classes(), 1),
    "class weights, as a module in a partial": (
        partial(nn.CrossEntropyLoss(weight=WEIGHT)), classes(), 1,
    ),
    "ignored targets": (nn.CrossEntropyLoss(), classes(ignored=True), 1),
    "weights and ignored targets": (
        partial(F.cross_entropy, weight=WEIGHT, ignore_index=2), classes(), 1,
    ),
    "a total and a count": (total_and_count, classes(ignored=True), 1),
    "a function with a denominator": (stated, classes(), 1),
    "a function with a denominator, in a partial": (partial(stated), classes(), 1),
    "class probabilities": (nn.CrossEntropyLoss(weight=WEIGHT), numbers().softmax(1), 1),
    "mean squared error": (nn.MSELoss(), numbers(), 1),
    "smooth L1": (nn.SmoothL1Loss(), numbers(), 1),
    "binary cross entropy": (nn.BCEWithLogitsLoss(pos_weight=WEIGHT), numbers().sigmoid(), 1),
    "Kullback-Leibler": (
        lambda o, t: F.kl_div(o.log_softmax(1), t, reduction="batchmean"), numbers().softmax(1), 1,
    ),
    "Poisson": (nn.PoissonNLLLoss(), numbers().exp(), 1),
    "multi-class margin": (nn.MultiMarginLoss(p=2), classes(), 1),
    "weighted margin": (nn.MultiMarginLoss(weight=WEIGHT, margin=0.5), classes(), 1),
}  # fmt: skip


def margin(outputs, targets, p, bound, weight):
    """The sum of `multi_margin_loss`, written out."""
    losses = []
    for scores, target in zip(outputs, targets, strict=True):
        others = [s for j, s in enumerate(scores) if j != target]
        terms = [
            torch.clamp(bound - scores[target] + s, min=0) ** p * weight[target] for s in others
        ]
        losses.append(sum(terms) / len(scores))
    return sum(losses) / len(losses)


REFERENCES = {
    "a total and a count": F.cross_entropy,
    "multi-class margin": lambda o, t: margin(o, t, 2, 1.0, torch.ones(3)),
    "weighted margin": lambda o, t: margin(o, t, 1, 0.5, WEIGHT),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_hessian_does_not_depend_on_the_microbatch(name):
    loss, targets, divisor = LOSSES[name]
    reference = REFERENCES.get(name, loss)
    expected = autograd_hessian(net(), reference, sample(targets), SAMPLES) / divisor
    for microbatch in (12, 4):
        result, operator = hessian(loss, targets, microbatch)
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-12)
    value = reference(net()(sample(targets).inputs), targets).item() / divisor
    assert operator.loss() == pytest.approx(value, rel=1e-10)
    assert sum(operator.weights) == pytest.approx(1)


def test_the_gauss_newton_matrix_of_a_weighted_mean():
    loss = partial(F.cross_entropy, weight=WEIGHT)
    results = [hessian(loss, classes(), m, matrix="gauss-newton")[0] for m in (12, 5)]
    torch.testing.assert_close(*results)


def test_tokens_of_sequences():
    """Outputs [n, classes, tokens], with padding that is ignored."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 3, (SAMPLES, 2), generator=generator)
    targets[torch.rand(SAMPLES, 2, generator=generator) < 0.3] = 0
    model = nn.Sequential(*net(outputs=6), nn.Unflatten(1, (3, 2)))
    loss = nn.CrossEntropyLoss(ignore_index=0)
    expected = autograd_hessian(model, loss, sample(targets), SAMPLES)
    torch.testing.assert_close(hessian(loss, targets, 5, model)[0], expected)


def test_every_token_of_a_sequence():
    """A language model's loss over flattened tokens; an autoencoder's targets are its inputs."""
    targets = torch.randint(0, 3, (SAMPLES, 2), generator=torch.Generator().manual_seed(0))
    model = nn.Sequential(*net(outputs=6), nn.Unflatten(1, (2, 3)))

    def loss(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    expected = autograd_hessian(model, loss, sample(targets), SAMPLES)
    torch.testing.assert_close(hessian(loss, targets, 5, model)[0], expected)
    model, inputs = net(outputs=4), sample(None).inputs
    expected = autograd_hessian(model, nn.MSELoss(), sample(inputs), SAMPLES)
    torch.testing.assert_close(hessian(nn.MSELoss(), inputs, 5, model)[0], expected)


def test_a_loss_that_changes_its_targets_in_place():
    targets = numbers()
    before = targets.clone()
    hessian(lambda o, t: F.mse_loss(o, t.mul_(2)), targets, 5)
    assert torch.equal(targets, before)


def test_the_eigenvalue_and_its_sampling_error():
    """The search on a part of the sample uses the same kind of mean."""
    loss = partial(F.cross_entropy, weight=WEIGHT)
    top = float(torch.linalg.eigvalsh(autograd_hessian(net(), loss, sample(classes()), 12))[-1])
    results = [
        estimate_eigenvalue(
            net(), loss, sample(classes()), SerialCommunicator(), method="lanczos",
            samples=SAMPLES, microbatch=microbatch, tol=1e-6, max_iter=40, threshold=1e6,
        )
        for microbatch in (3, 4)
    ]  # fmt: skip
    for result in results:
        assert result.eigenvalue.value == pytest.approx(top, rel=1e-6)
        assert 0 < result.eigenvalue.sampling_error < top


def masked(outputs, targets):
    kept = (targets != -100).to(outputs)
    losses = F.cross_entropy(outputs, targets, reduction="none")
    return (losses * kept).sum() / kept.sum()


masked.denominator = lambda targets: (targets != -100).sum()


def test_a_group_of_samples_without_targets_does_not_count_in_the_bound():
    """There the loss divides by zero, and its derivatives are NaN."""
    targets = classes()
    targets[4:6] = -100  # one of six groups
    value = estimate_eigenvalue(
        net(), masked, sample(targets), SerialCommunicator(), method="lanczos",
        samples=SAMPLES, microbatch=3, tol=1e-6, max_iter=40, threshold=1e6,
    ).eigenvalue  # fmt: skip
    assert value.converged
    assert 0 < value.sampling_error < math.inf
    assert value.value < value.upper_bound < 1e6


def test_everything_ignored_gives_no_number():
    result, operator = hessian(nn.CrossEntropyLoss(), torch.full((SAMPLES,), -100), 4)
    assert result.isnan().all()
    assert all(map(math.isnan, operator.weights))


def contrastive(outputs, targets):
    return F.cross_entropy(outputs @ outputs.T, torch.arange(len(outputs)))


@pytest.mark.parametrize(
    ("loss", "targets", "message"),
    [
        (weighted, classes(), "not a mean over samples.*denominator"),
        (lambda o, t: F.cross_entropy(o, t, reduction="sum"), classes(), "not a mean over samples"),
        (lambda o, t: F.cross_entropy(o, t), classes(ignored=True), "not a mean over samples"),
        (contrastive, classes(), "not a mean over samples"),
        (lambda o, t: (F.cross_entropy(o, t), 1), classes(), "the denominator of a batch is 1"),
        (lambda o, t: (o.sum(), o.abs().sum()), classes(), "denominator depends on the parameters"),
        (lambda o, t: (o.sum(), -1.0), classes(), "a finite denominator of 0 or more, got -1"),
        (lambda o, t: (o.sum(), 2.0, 3.0), classes(), r"\(sum, denominator\), got 3 values"),
        (partial(F.cross_entropy, reduction="none"), classes(), r"one real number.*\[12\]"),
        (lambda o, t: float(o.sum()), classes(), "expected a tensor, got float"),
    ],
)
def test_other_losses_are_refused_with_the_remedy(loss, targets, message):
    with pytest.raises(CurvatureError, match=message) as caught:
        hessian(loss, targets, 12)
    assert "\n" not in str(caught.value)


def test_outputs_and_targets_of_any_structure_are_checked():
    outputs, targets = numbers(), classes()

    def loss(o, t):
        return F.cross_entropy(o["logits"], t[0]) + 0.1 * o["penalty"]

    nested = {"logits": outputs, "penalty": torch.tensor(3.0)}
    assert check_mean(loss, nested, [targets], SAMPLES)
    with pytest.raises(CurvatureError):
        check_mean(lambda o, t: loss(o, t) * len(t[0]), nested, [targets], SAMPLES)
    # one dict per sample, as detection models have
    boxes = [{"label": target} for target in targets]
    assert check_mean(
        lambda o, t: F.cross_entropy(o, torch.stack([x["label"] for x in t])), outputs, boxes, 12
    )
    assert check_mean(lambda o, t: o.square().mean(), outputs, None, SAMPLES)
    assert not check_mean(lambda o, t: o["loss"], {"loss": torch.tensor(1.0)}, None, SAMPLES)
    assert not check_mean(lambda o, t: o.mean(), outputs[:1], targets[:1], 1)
