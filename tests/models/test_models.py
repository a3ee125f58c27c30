import subprocess
import sys

import pytest
import torch
from torch import nn

from hpc_absa.errors import UsageError
from hpc_absa.models import build

SMALL = ["digits-cnn", "resnet8", "resnet20", "wideresnet", "squeezenext", "c1", "resnet18-cifar"]


def weights(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("channels", "size", "classes"), [(3, 16, 10), (1, 8, 7)])
def test_shapes_and_gradients(name, channels, size, classes):
    torch.manual_seed(0)
    arguments = {"depth": 10, "widen": 1} if name == "wideresnet" else {}
    model = build(name, arguments, channels, size, classes)
    outputs = model(torch.randn(4, channels, size, size))
    assert outputs.shape == (4, classes)
    nn.functional.cross_entropy(outputs, torch.arange(4)).backward()
    for label, parameter in model.named_parameters():
        assert parameter.grad is not None, label
        assert parameter.grad.abs().sum() > 0, label


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        # He et al. 2016, table 6, in millions; and the exact counts that follow from section 4.2.
        ("resnet20", {}, 0.27e6),
        ("resnet32", {}, 0.46e6),
        ("resnet44", {}, 0.66e6),
        ("resnet56", {}, 0.85e6),
        ("resnet110", {}, 1.7e6),
        # Zagoruyko and Komodakis 2016, table 4.
        ("wideresnet", {"depth": 16, "widen": 8}, 11.0e6),
        ("wideresnet", {"depth": 40, "widen": 4}, 8.9e6),
        ("wideresnet", {"depth": 28, "widen": 10}, 36.5e6),
        # The 18-layer one for CIFAR as it is commonly given.
        ("resnet18-cifar", {}, 11.17e6),
    ],
)
def test_number_of_weights_is_the_published_one(name, arguments, expected):
    with torch.device("meta"):
        model = build(name, arguments, 3, 32, 10)
    digits = (
        4 if expected == 11.17e6 else len(f"{expected / 1e6:g}".replace("0.", "").replace(".", ""))
    )
    assert float(f"{weights(model):.{digits - 1}e}") == pytest.approx(expected)


def test_squeezenext_has_as_many_weights_as_in_its_paper():
    # 1.0-SqNxt-23 has 0.72 million for 1000 classes (table 2), with a 7 × 7 stem in place of 3 × 3.
    model = build("squeezenext", {}, 3, 32, 1000)
    assert weights(model) + 3 * 64 * (49 - 9) == pytest.approx(0.72e6, rel=0.01)


def test_c1_has_the_layers_of_the_authors():
    model = build("c1", {}, 3, 32, 10)
    convolutions = 64 * 3 * 25 + 64 + 64 * 64 * 25 + 64 + 4 * 64
    linear = 64 * 8 * 8 * 384 + 384 + 384 * 192 + 192 + 192 * 10 + 10
    assert weights(model) == convolutions + linear


def test_resnet_shortcuts_have_no_weights_and_keep_the_image():
    from hpc_absa.models.resnet import PaddedShortcut

    x = torch.randn(2, 3, 5, 5)
    y = PaddedShortcut(3, 8, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:5], x[:, :, ::2, ::2])
    assert y[:, :2].abs().sum() == y[:, 5:].abs().sum() == 0
    y = PaddedShortcut(3, 8, 2)(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", [*SMALL, "resnet18", "squeezenet1_1"])
def test_weights_are_a_function_of_the_seed(name):
    def made(seed):
        torch.manual_seed(seed)
        return build(name, {}, 3, 32, 10).state_dict()

    one, two = made(1), made(1)
    assert all(torch.equal(one[key], two[key]) for key in one)
    three = made(2)
    assert any(not torch.equal(one[key], three[key]) for key in one)


@pytest.mark.parametrize("name", ["resnet8", "digits-cnn"])
def test_channels_last_computes_the_same(name):
    torch.manual_seed(0)
    model = build(name, {}, 3, 16, 5).double().eval()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    result = model(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(result, expected)


def test_digits_cnn_has_a_hessian_everywhere():
    torch.manual_seed(0)
    model = build("digits-cnn", {"width": 2}, 1, 4, 3).double().eval()
    x = torch.randn(5, 1, 4, 4, dtype=torch.float64)
    parameter = model.features[0].weight
    direction = torch.randn_like(parameter)

    def gradient(shift):
        with torch.no_grad():
            parameter.add_(shift * direction)
        loss = nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1]))
        (result,) = torch.autograd.grad(loss, parameter, create_graph=True)
        return result

    (product,) = torch.autograd.grad((gradient(0.0) * direction).sum(), parameter)
    step = 1e-5
    slope = (gradient(step) - gradient(-2 * step)).detach() / (2 * step)
    torch.testing.assert_close(product, slope, rtol=1e-4, atol=1e-8)


# --- torchvision ------------------------------------------------------------------------------


def test_torchvision_by_name():
    model = build("resnet18", {"width_per_group": 64}, 3, 64, 7)
    assert type(model).__module__.startswith("torchvision.models")
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_a_model_with_auxiliary_classifiers_has_one_output():
    with torch.device("meta"):
        model = build("googlenet", {"init_weights": False}, 3, 64, 7)
        assert model.train()(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_importing_the_models_imports_no_torchvision():
    code = "import sys, hpc_absa.models as m; m.build('resnet8', {}, 3, 32, 10); "
    code += "assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- user-defined, and misuse ---- ---------------------------------------------------------------

OWN = """
from torch import nn

def perceptron(channels, classes, hidden: int = 8):
    return nn.Sequential(nn.Linear(channels, hidden), nn.Tanh(), nn.Linear(hidden, classes))

def wrong():
    return 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_model.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_user_defined_model(own):
    model = build("own_model:perceptron", {"hidden": 5}, 4, 1, 3)
    assert model[0].weight.shape == (5, 4)
    assert model(torch.randn(2, 4)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet21", {}, r'no model "resnet21"; did you mean .*resnet20.* Known are digits-cnn, '),
        ("digitscnn", {}, "did you mean digits-cnn"),
        ("completely other", {}, 'no model "completely other". Known are'),
        ("resnet20", {"width": 3}, "model.width: resnet20 has no such argument; .*: widths"),
        ("wideresnet", {"deep": 3}, "model.deep: wideresnet .*: depth, dropout, widen"),
        ("resnet18", {"width": 3}, "model.width: resnet18 has no such argument; .*zero_init"),
        ("c1", {"width": 3}, "c1 has no such argument; it takes none"),
        ("resnet20", {"widths": 3}, "model.widths: 3, expected 3 whole numbers"),
        ("resnet20", {"widths": [4, 8]}, "expected 3 whole numbers"),
        ("resnet20", {"widths": [8, 4, 8]}, "none smaller than the one before"),
        ("wideresnet", {"depth": 17}, r"model.depth: 17, expected 6n \+ 4"),
        ("wideresnet", {"widen": 0}, "model.widen: 0"),
        ("wideresnet", {"dropout": 1.5}, "model.dropout: 1.5"),
        ("squeezenext", {"widen": -1}, "model.widen: -1"),
        ("squeezenext", {"blocks": [1]}, "model.blocks"),
        ("digits-cnn", {"width": 0}, "model.width: 0"),
        ("digits-cnn", {"width": "8"}, "model.name = .digits-cnn. failed: TypeError"),
        ("squeezenext", {"blocks": 3}, "model.name = .squeezenext. failed: TypeError"),
        ("own_model:wrong", {}, "own_model:wrong returned int, expected a torch.nn.Module"),
        ("own_model:perceptron", {"hid": 5}, "model.hid: own_model:perceptron .*: hidden"),
        ("own_model:perceptrom", {}, "did you mean perceptron"),
    ],
)
def test_misuse(own, name, arguments, message):
    with pytest.raises(UsageError, match=message) as error:
        build(name, arguments, 3, 32, 10)
    assert "\n" not in str(error.value)


def test_torchvision_takes_three_channels():
    with pytest.raises(UsageError, match=r"resnet18 takes images with 3 channels, .* has 1"):
        build("resnet18", {}, 1, 32, 10)
