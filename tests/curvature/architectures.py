"""Small networks of many architectures, and their data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint_sequential

from tests.curvature.nets import Samples

SAMPLES, TOKENS = 12, 5


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


def distributed(kind, samples=SAMPLES):
    """(model, loss, sample) of one of: experts, language, checkpointed, frozen, packed."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(1, 7, (samples, TOKENS), generator=generator)
    text[::3, 3:] = 0
    targets = torch.randint(0, 3, (samples,), generator=generator)
    features = torch.randn(samples, 4, generator=generator).double()
    images = torch.randn(samples, 2, 4, 4, generator=generator).double()
    following = torch.cat([text[:, 1:], 0 * text[:, :1]], 1)
    make, inputs, targets, loss = {
        "experts": (Experts, features, targets, F.cross_entropy),
        "language": (LanguageModel, text, following, total_over_tokens),
        "checkpointed": (lambda: CheckpointedSequence(False), features, targets, F.cross_entropy),
        "frozen": (Frozen, images, targets, F.cross_entropy),
        "packed": (lambda: Packed(nn.GRU), text, targets, F.cross_entropy),
    }[kind]
    torch.manual_seed(0)
    return double(make()), loss, Samples(inputs, targets)
