"""Whole networks, every activation and every loss of torch: right, or refused in one line."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint_sequential

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.check import check_curvature
from hpc_absa.curvature.operator import HessianOperator, evaluation_mode
from hpc_absa.curvature.twice import CurvatureError
from tests.curvature.nets import Samples, autograd_hessian

SAMPLES, TOKENS = 12, 5


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


def tokens(seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(1, 7, (SAMPLES, TOKENS), generator=generator)
    inputs[::3, 3:] = 0  # padding
    return Samples(inputs, torch.randint(0, 3, (SAMPLES,), generator=generator))


def vectors(shape=(4,), targets=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, *shape, generator=generator).double()
    if targets is None:
        targets = torch.randint(0, 3, (SAMPLES,), generator=generator)
    return Samples(inputs, targets)


def double(model, seed=0):
    """In float64 with random parameters, also where they begin as 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.4)
        for name, tensor in model.named_buffers():
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return model


class LanguageModel(nn.Module):
    """Causal attention, tied to the output layer; the loss is over tokens but the padding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.position = nn.Parameter(torch.zeros(TOKENS, 4))
        layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, activation="gelu")
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(TOKENS, dtype=torch.float64)
        return self.head(self.body(self.embed(x) + self.position, mask, is_causal=True))

    @staticmethod
    def loss(outputs, targets):
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), ignore_index=0)


def total_over_tokens(outputs, targets):
    losses = F.cross_entropy(
        outputs.flatten(0, 1), targets.flatten(), ignore_index=0, reduction="sum"
    )
    return losses, (targets != 0).sum()


class Translator(nn.Module):
    """Encoder and decoder with masks of the padding; attention weights are computed too."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.body = nn.Transformer(4, 2, 1, 1, 5, batch_first=True, norm_first=True)
        self.pool = nn.MultiheadAttention(4, 1, batch_first=True, add_bias_kv=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        padding, e = x == 0, self.embed(x)
        y = self.body(e, e.flip(1), src_key_padding_mask=padding, memory_key_padding_mask=padding)
        y, _ = self.pool(y[:, :1], y, y, key_padding_mask=padding, need_weights=True)
        return self.head(y[:, 0])


class Packed(nn.Module):
    """Sequences of several lengths, through a recurrent network of two layers."""

    def __init__(self, kind, **options):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.rnn = kind(4, 3, 2, batch_first=True, dropout=0.3, **options)
        self.head = nn.Linear(options.get("proj_size", 3), 3)

    def forward(self, x):
        lengths = (x != 0).sum(1)
        packed = pack_padded_sequence(
            self.embed(x), lengths, batch_first=True, enforce_sorted=False
        )
        outputs, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        return self.head(outputs.sum(1) / lengths[:, None])


class Cells(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.gru, self.head = nn.LSTMCell(1, 3), nn.GRUCell(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        state, h = None, x.new_zeros(len(x), 3)
        for column in x.split(1, dim=1):
            state = self.lstm(column, state)
            h = self.gru(state[0], h)
        return self.head(h)


class Experts(nn.Module):
    """Each sample uses one expert; a microbatch leaves some of them unused."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 3) for _ in range(4))
        self.unused = nn.Linear(4, 3)

    def forward(self, x):
        weights = self.gate(x).softmax(1)
        best = x.argmax(1)
        outputs = x.new_zeros(len(x), 3)
        for index, expert in enumerate(self.experts):
            rows = (best == index).nonzero()[:, 0]
            if len(rows):
                outputs = outputs.index_add(0, rows, torch.tanh(expert(x[rows])))
        return outputs * weights.gather(1, best[:, None])


class Siamese(nn.Module):
    """One network for two views, and a distance between them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh())
        self.bilinear = nn.Bilinear(3, 3, 3)

    def forward(self, x):
        a, b = self.body(x), self.body(x.flip(1))
        return self.bilinear(a, b) + F.pairwise_distance(a, b)[:, None]


class CheckpointedSequence(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
        self.head, self.reentrant = nn.Linear(3, 3), reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.head(self.body(x))
        return self.head(checkpoint_sequential(self.body, 2, x, use_reentrant=self.reentrant))


class Frozen(nn.Module):
    """A frozen backbone with a trained normalization, as in fine-tuning."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.SiLU(), nn.Conv2d(3, 3, 2)
        )
        self.head = nn.Linear(3, 3)
        for parameter in self.backbone[0].parameters():
            parameter.requires_grad_(False)
        self.backbone[3].bias.requires_grad_(False)

    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))


def volume(*layers):
    return nn.Sequential(
        nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.Tanh(), *layers, nn.Flatten(), nn.Linear(16, 3)
    )


def image(*layers, features=16):
    return nn.Sequential(nn.Conv2d(2, 4, 3), *layers, nn.Flatten(), nn.Linear(features, 3))


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
