"""Whole networks, every activation and every loss of torch: right, or refused in one line."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.check import check_curvature
from hpc_absa.curvature.operator import HessianOperator, evaluation_mode
from hpc_absa.curvature.twice import CurvatureError
from tests.curvature.architectures import (
    SAMPLES,
    Cells,
    CheckpointedSequence,
    Experts,
    Frozen,
    LanguageModel,
    Packed,
    Siamese,
    Translator,
    double,
    image,
    tokens,
    total_over_tokens,
    vectors,
    volume,
)  # fmt: skip
from tests.curvature.nets import autograd_hessian


def products(model, loss, sample, vectors, **options):
    with evaluation_mode(model):
        operator = HessianOperator(
            model, loss, sample, SerialCommunicator(),
            **{"samples": SAMPLES, "microbatch": 5, "keep_graphs": 1} | options,
        )  # fmt: skip
        return torch.stack([operator.matvec(v) for v in vectors])


def require_right(model, loss, sample, reference=None, reference_loss=None):
    """Three products by microbatches of 5, 5 and 2 equal those by double backward on one batch."""
    reference, reference_loss = reference or model, reference_loss or loss
    size = sum(p.numel() for p in model.parameters() if p.requires_grad)
    vectors = torch.randn(3, size, generator=torch.Generator().manual_seed(0)).double()
    expected = autograd_hessian(reference, reference_loss, sample, SAMPLES, vectors=vectors)
    found = products(model, loss, sample, vectors)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    check_curvature(model, loss, sample, microbatch=5)


NETWORKS = {
    "encoder, decoder and masks": (Translator, tokens()),
    "LSTM of packed sequences": (lambda: Packed(nn.LSTM), tokens()),
    "LSTM with projections": (lambda: Packed(nn.LSTM, proj_size=2), tokens()),
    "GRU of packed sequences": (lambda: Packed(nn.GRU), tokens()),
    "recurrent cells": (Cells, vectors()),
    "experts": (Experts, vectors()),
    "siamese": (Siamese, vectors()),
    "frozen backbone": (Frozen, vectors((2, 4, 4))),
    "volumes": (volume, vectors((1, 3, 3, 3))),
    "local response and adaptive pooling": (
        lambda: image(nn.LocalResponseNorm(2), nn.GELU(), nn.AdaptiveAvgPool2d(2)),
        vectors((2, 5, 5)),
    ),
    "synchronized batch norm": (lambda: image(nn.SyncBatchNorm(4), nn.Tanh()), vectors((2, 4, 4))),
    "fixed statistics, no scale": (
        lambda: image(nn.BatchNorm2d(4, affine=False), nn.Tanh()), vectors((2, 4, 4)),
    ),
    "upsampling and pixel shuffle": (
        lambda: image(nn.Tanh(), nn.PixelShuffle(2), nn.Upsample(scale_factor=2, mode="bilinear"),
                      features=64),
        vectors((2, 4, 4)),
    ),
    "unfold and fold": (
        lambda: image(nn.Tanh(), nn.Unfold(2), nn.Fold((2, 2), 2)), vectors((2, 4, 4)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    make, sample = NETWORKS[name]
    torch.manual_seed(0)
    require_right(double(make()), F.cross_entropy, sample)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(ignore_index=0), total_over_tokens])
def test_a_language_model(loss):
    """The mean over tokens does not depend on how many of a microbatch are padding."""
    sample = tokens()
    sample.targets = torch.cat([sample.inputs[:, 1:], 0 * sample.inputs[:, :1]], 1)
    model = double(LanguageModel())
    if isinstance(loss, nn.Module):  # wants [n, classes, tokens]
        inner = model
        model = nn.Sequential(inner, _Transposed())
        reference = LanguageModel.loss
        require_right(model, loss, sample, inner, reference)
    else:
        require_right(model, loss, sample, reference_loss=LanguageModel.loss)


class _Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_sequence_of_checkpoints(reentrant):
    model, plain = double(CheckpointedSequence(reentrant)), double(CheckpointedSequence(None))
    require_right(model, F.cross_entropy, vectors(), plain)


ACTIVATIONS = [
    nn.CELU, nn.ELU, nn.GELU, nn.GLU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
    nn.LeakyReLU, nn.LogSigmoid, nn.LogSoftmax, nn.Mish, nn.PReLU, nn.RReLU, nn.ReLU, nn.ReLU6,
    nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softmax, nn.Softmin, nn.Softplus, nn.Softshrink, nn.Softsign,
    nn.Tanh, nn.Tanhshrink,
]  # fmt: skip


@pytest.mark.parametrize("kind", ACTIVATIONS, ids=lambda kind: kind.__name__)
def test_activations(kind):
    dim = {"dim": 1} if "Soft" in kind.__name__ and "m" in kind.__name__[-3:] else {}
    layer = kind(**dim)
    model = double(nn.Sequential(nn.Linear(4, 6), layer, nn.Linear(3 if kind is nn.GLU else 6, 3)))
    reference = model
    if kind is nn.Hardsigmoid:
        reference = nn.Sequential(model[0], _Hardsigmoid(), model[2])
    require_right(model, F.cross_entropy, vectors(), reference)


class _Hardsigmoid(nn.Module):
    def forward(self, x):
        return (x / 6 + 0.5).clamp(0, 1)


def _numbers(seed=2):
    return torch.randn(SAMPLES, 3, generator=torch.Generator().manual_seed(seed)).double()


SIGNS = _numbers().sign()
CLASSES = vectors().targets
LOSSES = {
    "L1": (nn.L1Loss(), _numbers()),
    "Huber": (nn.HuberLoss(delta=0.3), _numbers()),
    "soft margin": (nn.SoftMarginLoss(), SIGNS),
    "multi-label soft margin": (nn.MultiLabelSoftMarginLoss(), (SIGNS + 1) / 2),
    "hinge embedding": (nn.HingeEmbeddingLoss(), SIGNS),
    "multi-label margin": (nn.MultiLabelMarginLoss(), torch.tensor([[0, 2, -1]] * SAMPLES)),
    "negative log likelihood": (lambda o, t: F.nll_loss(o.log_softmax(1), t), CLASSES),
    "binary cross entropy": (lambda o, t: F.binary_cross_entropy(o.sigmoid(), t), (SIGNS + 1) / 2),
    "Gaussian": (
        lambda o, t: F.gaussian_nll_loss(o[:, :1], t[:, :1], o[:, 1:2].exp()), _numbers(),
    ),
    "cosine embedding": (
        lambda o, t: F.cosine_embedding_loss(o, t, torch.ones(len(o)).double()), _numbers(),
    ),
    "triplet": (lambda o, t: F.triplet_margin_loss(o, t, t.flip(1)), _numbers()),
    "ranking": (
        lambda o, t: F.margin_ranking_loss(o[:, 0], o[:, 1], t[:, 0].sign(), margin=1.0),
        _numbers(),
    ),
    "sum of squares per sample": (lambda o, t: (o - t).square().sum(1).mean(), _numbers()),
    "connectionist temporal classification": (
        lambda o, t: F.ctc_loss(
            o.log_softmax(1).expand(4, -1, -1).contiguous(), t[:, None] % 2 + 1,
            torch.full((len(o),), 4), torch.full((len(o),), 1),
        ),
        CLASSES,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    """What torch cannot differentiate twice is refused in one line."""
    loss, targets = LOSSES[name]
    model = double(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)))
    sample = vectors(targets=targets)
    try:
        autograd_hessian(model, loss, sample, SAMPLES)
    except RuntimeError:
        with pytest.raises(CurvatureError, match="differentiate") as caught:
            products(model, loss, sample, torch.zeros(1, 35).double())
        assert "\n" not in str(caught.value)
        return
    require_right(model, loss, sample)


@pytest.mark.parametrize("samples", [1, 2, 7])
@pytest.mark.parametrize("microbatch", [1, 3, 12])
def test_batches_of_any_size(samples, microbatch):
    model, sample = double(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 3))), vectors()
    expected = autograd_hessian(model, F.cross_entropy, sample, samples)
    vector = torch.ones(1, 35).double()
    found = products(model, F.cross_entropy, sample, vector, samples=samples, microbatch=microbatch)
    torch.testing.assert_close(found, vector @ expected)
