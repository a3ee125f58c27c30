"""Products on models of many kinds against the dense Hessian by plain double backward."""

from __future__ import annotations

import random
from collections import UserDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint as checkpointing

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.estimate import estimate_eigenvalue
from hpc_absa.curvature.fast import Arguments
from hpc_absa.curvature.operator import FunctionModel, HessianOperator, evaluation_mode
from tests.curvature.nets import Samples, autograd_hessian

SAMPLES = 12


def operator_hessian(model, loss, sample, *, microbatch=5, samples=SAMPLES, **options):
    with evaluation_mode(model):
        operator = HessianOperator(
            model, loss, sample, SerialCommunicator(), samples=samples, microbatch=microbatch,
            **{"keep_graphs": 3} | options,
        )  # fmt: skip
        identity = torch.eye(operator.size, dtype=operator.dtype)
        return torch.stack([operator.matvec(row) for row in identity])


def close(actual, expected, tolerance=1e-10):
    assert float((actual - expected).norm()) <= tolerance * max(1e-3, float(expected.norm()))


def randomized(model, seed=0):
    """In float64, with biases, scales and running statistics that are not 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() and tensor.dim() <= 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


def images(channels=2, size=6, classes=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, channels, size, size, generator=generator).double()
    return Samples(inputs, torch.randint(0, classes, (SAMPLES,), generator=generator))


def vectors(features=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(SAMPLES, features, generator=generator).double()
    return Samples(inputs, torch.randint(0, 3, (SAMPLES,), generator=generator))


class Function(nn.Module):
    """`function(x, *modules)`."""

    def __init__(self, function, *modules):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.parts)


def build(function, *modules):
    torch.manual_seed(3)
    return randomized(Function(function, *(module() for module in modules)))


def conv(inputs=2, outputs=4, kernel=3, **options):
    return lambda: nn.Conv2d(inputs, outputs, kernel, **options)


def linear(inputs, outputs=3):
    return lambda: nn.Linear(inputs, outputs)


def batch_norm(features, **options):
    return lambda: nn.BatchNorm2d(features, **options)


IMAGE_MODELS = {
    "view after a convolution": build(
        lambda x, c, h: h(torch.tanh(c(x)).view(len(x), -1)), conv(), linear(64)
    ),
    "the input changed in place": build(
        lambda x, c, h: h(c(x.mul_(0.5).add_(1)).tanh().flatten(1)), conv(), linear(64)
    ),
    "activations changed in place": build(
        lambda x, c, b, h: h(F.silu(b(c(x)), inplace=True).mul_(2).flatten(1)),
        conv(), batch_norm(4), linear(64),
    ),
    "a convolution used twice": build(
        lambda x, c, d, b, h: h(torch.tanh(b(d(d(c(x))))).flatten(1)),
        conv(), conv(4, 4, 1), batch_norm(4), linear(64),
    ),
    "a normalization used twice": build(
        lambda x, c, d, b, h: h(torch.tanh(b(d(torch.tanh(b(c(x)))))).flatten(1)),
        conv(), conv(4, 4, 1), batch_norm(4), linear(64),
    ),
    "instance norm": build(
        lambda x, c, b, h: h(torch.tanh(b(c(x))).flatten(1)),
        conv(), lambda: nn.InstanceNorm2d(4, affine=True), linear(64),
    ),
    "instance norm with running statistics": build(
        lambda x, c, b, h: h(torch.tanh(b(c(x))).flatten(1)),
        conv(), lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True), linear(64),
    ),
    "group norm": build(
        lambda x, c, b, h: h(torch.tanh(b(c(x))).flatten(1)),
        conv(), lambda: nn.GroupNorm(2, 4), linear(64),
    ),
    "hardswish, hardsigmoid and pooling": build(
        lambda x, c, h: h(F.max_pool2d(F.hardswish(c(x)) * F.hardsigmoid(c(x)), 2).flatten(1)),
        conv(), linear(16),
    ),
    "hardsigmoid in place": build(
        lambda x, c, h: h(F.hardsigmoid(c(x), inplace=True).flatten(1)), conv(), linear(64)
    ),
    "transposed and padded convolutions": build(
        lambda x, c, d, h: h(torch.tanh(d(torch.tanh(c(x)))).mean((2, 3))),
        conv(2, 3, 3, padding="same"), lambda: nn.ConvTranspose2d(3, 4, 2, stride=2), linear(4),
    ),
    "LeNet": build(
        lambda x, c, d, a, h: h(
            F.relu(a(F.max_pool2d(F.relu(d(F.max_pool2d(F.relu(c(x)), 2))), 2).view(-1, 4)))
        ),
        conv(2, 3, 3, padding=1), conv(3, 4, 2, padding=0), linear(4, 5), linear(5),
    ),
    "a residual block with a padded shortcut": build(
        lambda x, c, b, d, e, h: h(
            F.avg_pool2d(
                F.relu(
                    e(d(F.relu(b(c(x)))))
                    + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1), "constant", 0)
                ),
                3,
            ).view(len(x), -1)
        ),
        conv(2, 4, 3, stride=2, padding=1, bias=False), batch_norm(4),
        conv(4, 4, 3, padding=1, bias=False), batch_norm(4), linear(4),
    ),
    "a convolution of sequences": build(
        lambda x, c, b, h: h(F.silu(b(c(x.flatten(2)))).mean(2)),
        lambda: nn.Conv1d(2, 4, 5, dilation=2), lambda: nn.BatchNorm1d(4), linear(4),
    ),
    "spectral norm of a convolution": build(
        lambda x, c, b, h: h(torch.tanh(b(c(x))).flatten(1)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(2, 4, 3)), batch_norm(4),
        linear(64),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_image_models(name):
    model, sample = IMAGE_MODELS[name], images()
    inputs = sample.inputs.clone()
    expected = autograd_hessian(model, F.cross_entropy, sample, SAMPLES, exchanged=True)
    close(operator_hessian(model, F.cross_entropy, sample), expected)
    assert torch.equal(sample.inputs, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_view_after_a_convolution_runs_without_channels_last(dtype):
    model = build(lambda x, c, h: h(torch.tanh(c(x)).view(len(x), -1)), conv(), linear(64))
    model.to(dtype)
    sample = images()
    sample.inputs = sample.inputs.to(dtype)
    expected = autograd_hessian(model.double(), F.cross_entropy, images(), SAMPLES)
    result = operator_hessian(model.to(dtype), F.cross_entropy, sample)
    close(result.double(), expected, 1e-5 if dtype is torch.float32 else 0.1)


def test_the_model_sees_what_the_sample_gives():
    """Shapes, dtypes and memory formats of the inputs are the sample's; never its storage."""
    seen = []

    def function(x, c, b, h):
        seen.append((len(x), x.dtype, x.stride(), x.data_ptr()))
        return h(torch.tanh(b(c(x))).mean((2, 3)))

    model = build(function, conv(), batch_norm(4), linear(4)).float()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        sample = images()
        sample.inputs = sample.inputs.float().contiguous(memory_format=memory_format)
        own = sample.inputs.untyped_storage()
        seen.clear()
        operator_hessian(model, F.cross_entropy, sample, microbatch=6)
        assert {s[:3] for s in seen} == {(6, torch.float32, sample.inputs[:6].stride())}
        assert not any(own.data_ptr() <= s[3] < own.data_ptr() + own.nbytes() for s in seen)


@pytest.mark.parametrize("parametrized", [True, False])
def test_weight_norm(parametrized):
    """torch's own second derivative is wrong, so the reference is written out."""
    norm = nn.utils.parametrizations.weight_norm if parametrized else nn.utils.weight_norm
    torch.manual_seed(0)
    plain = randomized(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    first, second = plain[0].weight.detach(), plain[2].weight.detach()
    parameters = [  # in the order of the model's parameters
        plain[0].bias, torch.rand(5, 1).double() + 0.5, first,
        plain[2].bias, torch.rand(1, 3).T.double() + 0.5, second,
    ]  # fmt: skip
    model = nn.Sequential(norm(plain[0]), nn.Tanh(), norm(plain[2]))
    with torch.no_grad():
        for own, value in zip(model.parameters(), parameters, strict=True):
            own.copy_(value)
    before = vars(model[0]).get("weight")

    def explicit(p, x):
        def weight(g, v):
            return g * v / v.norm(dim=1, keepdim=True)

        x = torch.tanh(F.linear(x, weight(p[1], p[2]), p[0]))
        return F.linear(x, weight(p[4], p[5]), p[3])

    sample = vectors()
    reference = FunctionModel(explicit, parameters)
    expected = autograd_hessian(reference, F.cross_entropy, sample, SAMPLES)
    close(operator_hessian(model, F.cross_entropy, sample), expected)
    assert vars(model[0]).get("weight") is before


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(4, 3, batch_first=True, bidirectional=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = torch.stack([x, x.flip(1), -x], 1)
        return self.head(self.rnn(x)[0][:, -1])


class Attentive(nn.Module):
    """Attention by module, by function, and with the kernel chosen by the model."""

    def __init__(self, kernel):
        super().__init__()
        self.a = nn.MultiheadAttention(4, 2, batch_first=True)
        self.qkv, self.head, self.kernel = nn.Linear(4, 12), nn.Linear(4, 3), kernel

    def forward(self, x):
        x = torch.stack([x, x.flip(1), x**2], 1)
        with sdpa_kernel(self.kernel):
            x = x + self.a(x, x, x, need_weights=False)[0]
            q, k, v = self.qkv(x)[:, None].chunk(3, -1)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return self.head(x.mean(1))


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.second, self.reentrant = nn.Linear(4, 5), nn.Linear(5, 3), reentrant

    def forward(self, x):
        def body(x):
            return torch.tanh(self.second(torch.tanh(self.first(x))))

        if self.reentrant is None:
            return body(x)
        return checkpointing.checkpoint(body, x, use_reentrant=self.reentrant)


VECTOR_MODELS = {
    **{kind.__name__: Recurrent(kind) for kind in (nn.LSTM, nn.GRU, nn.RNN)},
    "spectral norm": nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(4, 5)), nn.Tanh(),
        nn.utils.spectral_norm(nn.Linear(5, 3)),
    ),
    "layer and root mean square norm": nn.Sequential(
        nn.Linear(4, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 6), nn.RMSNorm(6), nn.Linear(6, 3)
    ),
    "dropout and parametric activations": nn.Sequential(
        nn.Linear(4, 6), nn.PReLU(), nn.Dropout(0.5), nn.Linear(6, 6), nn.Softplus(),
        nn.AlphaDropout(0.3), nn.Linear(6, 3),
    ),
    "no dependence on the parameters": nn.Sequential(nn.Linear(4, 3), nn.Threshold(1e9, 0.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", VECTOR_MODELS)
def test_vector_models(name):
    model, sample = randomized(VECTOR_MODELS[name]), vectors()
    expected = autograd_hessian(model, F.cross_entropy, sample, SAMPLES)
    close(operator_hessian(model, F.cross_entropy, sample), expected)


def test_attention_of_every_kernel():
    model, plain = (
        randomized(Attentive(kernel)) for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
    )
    plain.load_state_dict(model.state_dict())
    sample = vectors()
    with pytest.raises(RuntimeError, match="flash_attention"):
        autograd_hessian(model, F.cross_entropy, sample, SAMPLES)
    with sdpa_kernel(SDPBackend.MATH):
        expected = autograd_hessian(plain, F.cross_entropy, sample, SAMPLES)
    close(operator_hessian(model, F.cross_entropy, sample), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant):
    model, plain = randomized(Checkpointed(reentrant)), randomized(Checkpointed(None))
    plain.load_state_dict(model.state_dict())
    sample = vectors()
    expected = autograd_hessian(plain, F.cross_entropy, sample, SAMPLES)
    close(operator_hessian(model, F.cross_entropy, sample), expected)
    model(sample.inputs.requires_grad_()).sum().backward()  # checkpointing works as before
    assert model.first.weight.grad is not None


def test_autocast_around_it_has_no_effect():
    with torch.autocast("cpu", torch.bfloat16):
        with evaluation_mode(nn.Linear(2, 1)):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


def test_a_compiled_model_runs_as_python():
    torch.manual_seed(0)
    inner = randomized(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)))
    sample = vectors()
    expected = autograd_hessian(inner, F.cross_entropy, sample, SAMPLES)
    close(operator_hessian(torch.compile(inner), F.cross_entropy, sample), expected)


@pytest.mark.parametrize("sizes", [(6, 6), (5,)])
def test_normalization_without_running_statistics(sizes):
    """Its microbatches are those of training, or equal parts, never a single sample."""
    model = build(
        lambda x, c, b, h: h(torch.tanh(b(c(x))).mean((2, 3))),
        conv(), batch_norm(4, track_running_stats=False), linear(4),
    )  # fmt: skip
    seen = []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    sample = images()
    result = operator_hessian(model, F.cross_entropy, sample, microbatch=sizes[0], samples=11)
    assert set(seen) <= {3, 4, 5, 6}
    bounds, start = [], 0
    for size in {6: (5, 6), 5: (3, 4, 4)}[sizes[0]]:
        bounds.append((start, start + size))
        start += size
    expected = sum(
        (stop - start)
        / 11
        * autograd_hessian(
            model, F.cross_entropy,
            Samples(sample.inputs[start:stop], sample.targets[start:stop]), stop - start,
        )
        for start, stop in bounds
    )  # fmt: skip
    close(result, expected)


def test_the_search_uses_the_microbatches_of_training_for_batch_statistics():
    model = build(
        lambda x, c, b, h: h(torch.tanh(b(c(x))).mean((2, 3))),
        conv(), batch_norm(4, track_running_stats=False), linear(4),
    )  # fmt: skip
    sample = images()
    sample = Samples(sample.inputs.repeat(16, 1, 1, 1), sample.targets.repeat(16))
    seen = set()
    model.register_forward_pre_hook(lambda module, inputs: seen.add(len(inputs[0])))
    estimate_eigenvalue(
        model, F.cross_entropy, sample, SerialCommunicator(), method="lanczos",
        samples=192, microbatch=96, tol=1e-2, max_iter=10,
    )  # fmt: skip
    assert seen == {96}


def tokens(seed=1):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, 7, (SAMPLES, 5), generator=generator)
    return Samples(inputs, torch.randint(0, 7, (SAMPLES,), generator=generator))


class Tied(nn.Module):
    """An embedding, tied to the output layer."""

    def __init__(self, **options):
        super().__init__()
        self.embed = nn.Embedding(7, 4, **options)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.body(self.embed(x)))).mean(1)


@pytest.mark.parametrize(
    "options", [{}, {"padding_idx": 2}, {"sparse": True}, {"scale_grad_by_freq": True}]
)
def test_embeddings(options):
    torch.manual_seed(2)
    model, plain = (
        randomized(Tied(**options)),
        randomized(Tied(padding_idx=options.get("padding_idx"))),
    )
    plain.load_state_dict(model.state_dict())
    expected = autograd_hessian(plain, F.cross_entropy, tokens(), SAMPLES)
    close(operator_hessian(model, F.cross_entropy, tokens()), expected)


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("padding", [None, 2])
def test_bags_of_embeddings(mode, offsets, padding):
    torch.manual_seed(2)
    bag = nn.EmbeddingBag(7, 4, mode=mode, padding_idx=padding, sparse=True)
    model = randomized(nn.Sequential(bag, nn.Tanh(), nn.Linear(4, 7)))

    def bags(p, x):
        """The same, from a loop."""
        rows = []
        for line in x:
            kept = p[0][line[line != padding] if padding is not None else line]
            rows.append(kept.sum(0) / (max(1, len(kept)) if mode == "mean" else 1))
        return F.linear(torch.tanh(torch.stack(rows)), p[1], p[2])

    reference = FunctionModel(bags, list(model.parameters()))
    expected = autograd_hessian(reference, F.cross_entropy, tokens(), SAMPLES)
    sample = tokens()
    if offsets:
        whole = sample.load

        def load(start, stop):
            inputs, targets = whole(start, stop)
            starts = torch.arange(0, inputs.numel(), inputs.shape[1])
            return Arguments((inputs.flatten(),), {"offsets": starts}), targets

        sample.load = load
        first, rest = model[0], model[1:]

        class Bags(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.rest = first, rest

            def forward(self, x, offsets):
                return self.rest(self.first(x, offsets))

        model = Bags()
    close(operator_hessian(model, F.cross_entropy, sample), expected)


def test_distances():
    model = build(
        lambda x, a, b: torch.cdist(a(x), b.weight) + F.pdist(a.weight).mean(),
        linear(4, 3),
        linear(3),
    )

    def explicit(p, x):
        a = F.linear(x, p[0], p[1])
        pairs = [(p[0][i] - p[0][j]).norm() for i in range(3) for j in range(i)]
        return (a[:, None] - p[2]).norm(dim=-1) + torch.stack(pairs).mean()

    reference = FunctionModel(explicit, list(model.parameters())[:3])
    expected = autograd_hessian(reference, F.cross_entropy, vectors(), SAMPLES)
    result = operator_hessian(model, F.cross_entropy, vectors())
    assert not result[-3:].any(), "the unused bias"
    close(result[:-3, :-3], expected)


# Inputs of any structure


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x, y=None, scale=1.0):
        if isinstance(x, dict | UserDict):
            x, y = x["x"], x["y"]
        elif isinstance(x, list):
            x, y = x
        return torch.tanh(self.a(x)) * scale + self.b(y) ** 2


@pytest.mark.parametrize(
    "arrange",
    [
        lambda x, y: {"x": x, "y": y},
        lambda x, y: UserDict({"x": x, "y": y}),
        lambda x, y: [x, y],
        lambda x, y: Arguments((x, y)),
        lambda x, y: Arguments((x,), {"y": y, "scale": 1.0}),
    ],
)
def test_inputs_of_several_tensors(arrange):
    torch.manual_seed(0)
    model, sample = randomized(Pair()), vectors()
    load = sample.load

    def rearranged(start, stop):
        inputs, targets = load(start, stop)
        return arrange(inputs, inputs.flip(1)), targets

    reference = FunctionModel(
        lambda p, x: torch.tanh(F.linear(x, p[0], p[1])) + F.linear(x.flip(1), p[2], p[3]) ** 2,
        list(model.parameters()),
    )
    expected = autograd_hessian(reference, F.cross_entropy, sample, SAMPLES)
    sample.load = rearranged
    close(operator_hessian(model, F.cross_entropy, sample), expected)


def test_a_function_of_parameters():
    """Rosenbrock's function, whose Hessian is known; a sample without data."""

    class Nothing:
        size = 1

        def load(self, start, stop):
            return None, None

    def rosenbrock(p, inputs):
        return (1 - p["x"]) ** 2 + 100 * (p["y"] - p["x"] ** 2) ** 2

    point = {"x": torch.tensor(-1.2, dtype=torch.float64), "y": torch.tensor(1.0).double()}
    model = FunctionModel(rosenbrock, point)
    expected = torch.tensor([[1200 * 1.44 - 400 + 2, 480.0], [480.0, 200.0]]).double()
    result = operator_hessian(model, lambda o, t: o, Nothing(), samples=1)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_parameters_of_two_dtypes(dtypes):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    torch.manual_seed(0)
    sample, double = vectors(), randomized(model)
    expected = autograd_hessian(double, F.cross_entropy, sample, SAMPLES)
    model = build(
        lambda x, a, b: b(torch.tanh(a(x.to(dtypes[0]))).to(dtypes[1])),
        linear(4, 5), linear(5),
    )  # fmt: skip
    model.parts[0].load_state_dict(double[0].state_dict())
    model.parts[1].load_state_dict(double[2].state_dict())
    model.parts[0].to(dtypes[0])
    model.parts[1].to(dtypes[1])
    result = operator_hessian(model, F.cross_entropy, sample)
    assert result.dtype == torch.float64
    close(result, expected, 1e-5)


def test_random_layers_give_one_operator():
    """Dropout that stays random in evaluation mode is fixed, so that products are linear."""
    model = build(lambda x, a, b: b(F.dropout(torch.tanh(a(x)))), linear(4, 6), linear(6))
    first = operator_hessian(model, F.cross_entropy, vectors(), keep_graphs=0)
    close(first, first.T)
    assert torch.equal(operator_hessian(model, F.cross_entropy, vectors()), first)


# Random models


def _random_layer(generator, channels):
    """A layer from `channels` to as many channels, or to others."""
    out = generator.choice([2, 3, 4])

    class Residual(nn.Module):
        def __init__(self, *layers):
            super().__init__()
            self.body = nn.Sequential(*layers)

        def forward(self, x):
            return x + self.body(x)

    class Ckpt(Residual):
        def forward(self, x):
            return checkpointing.checkpoint(self.body, x, use_reentrant=False)

    def norm(features):
        return generator.choice(
            [
                nn.BatchNorm2d(features),
                nn.BatchNorm2d(features, affine=False),
                nn.GroupNorm(1, features),
                nn.InstanceNorm2d(features, affine=True),
                nn.InstanceNorm2d(features, track_running_stats=True),
                nn.Identity(),
            ]
        )

    def activation():
        kinds = [nn.Tanh, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.ELU, nn.GELU, nn.Softplus]
        return generator.choice(kinds)()

    bias = generator.random() < 0.5
    convolution = nn.Conv2d(channels, out, generator.choice([1, 3]), padding=1, bias=bias)
    kind = generator.randrange(7)
    if kind == 0:
        return Residual(nn.Conv2d(channels, channels, 3, padding=1), norm(channels)), channels
    if kind == 1:
        return Ckpt(convolution, norm(out), activation()), out
    if kind == 2:
        return nn.Sequential(nn.utils.parametrizations.spectral_norm(convolution), norm(out)), out
    if kind == 3:
        frozen = nn.Sequential(convolution, norm(out))
        frozen[0].requires_grad_(False)
        return frozen, out
    if kind == 4:
        return nn.Sequential(norm(channels), activation(), nn.AvgPool2d(2, 1)), channels
    if kind == 5:
        shared = nn.Conv2d(channels, channels, 1, groups=channels)
        return nn.Sequential(shared, norm(channels), activation(), shared), channels
    return nn.Sequential(convolution, norm(out), activation()), out


class Flattened(nn.Module):
    def __init__(self, view):
        super().__init__()
        self.view = view

    def forward(self, x):
        return x.view(len(x), -1) if self.view else x.mean((2, 3))


def random_model(seed):
    generator = random.Random(seed)
    torch.manual_seed(seed)
    layers, channels = [], 2
    for _ in range(generator.choice([1, 2, 3])):
        layer, channels = _random_layer(generator, channels)
        layers.append(layer)
    body = nn.Sequential(*layers, Flattened(generator.random() < 0.5))
    features = body(torch.zeros(2, 2, 4, 4)).shape[1]
    return randomized(nn.Sequential(body, nn.Linear(features, 3)), seed)


@pytest.mark.parametrize("seed", range(12))
def test_random_models(seed):
    model, sample = random_model(seed), images(size=4, seed=seed)
    microbatch = [12, 5, 3, 7][seed % 4]
    # Checkpointing and hardsigmoid are not for plain double backward.
    expected = autograd_hessian(model, F.cross_entropy, sample, SAMPLES, exchanged=True)
    generator = torch.Generator().manual_seed(seed)
    with evaluation_mode(model):
        operator = HessianOperator(
            model, F.cross_entropy, sample, SerialCommunicator(),
            samples=SAMPLES, microbatch=microbatch,
        )  # fmt: skip
        for _ in range(2):
            v = torch.randn(operator.size, generator=generator).double()
            close(operator.matvec(v), expected @ v)
    top = float(torch.linalg.eigvalsh(expected)[-1])
    result = estimate_eigenvalue(
        model, F.cross_entropy, sample, SerialCommunicator(), method="lanczos",
        samples=SAMPLES, microbatch=microbatch, tol=1e-6, max_iter=60,
    )  # fmt: skip
    assert result.eigenvalue.value == pytest.approx(top, rel=1e-5)


def test_float32_models():
    """In the layout that convolutions are fastest in."""
    for seed in range(6):
        model, sample = random_model(seed), images(size=4, seed=seed)
        expected = autograd_hessian(model, F.cross_entropy, sample, SAMPLES, exchanged=True)
        sample.inputs = sample.inputs.float()
        v = torch.randn(len(expected), generator=torch.Generator().manual_seed(seed))
        with evaluation_mode(model.float()):
            operator = HessianOperator(
                model, F.cross_entropy, sample, SerialCommunicator(), samples=12, microbatch=5
            )
            close(operator.matvec(v).double(), expected @ v.double(), 1e-4)
