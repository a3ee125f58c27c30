"""What tracing finds: layers, multiplications, additions, and folded batch norms."""

import pytest
import torch
from torch import nn

from hpc_absa.errors import UsageError
from hpc_absa.models import build
from hpc_absa.quantization.graph import trace
from hpc_absa.torchvision_import import torchvision
from tests.shared_data import ResNet20


def with_statistics(model):
    """Batch norms as after training."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1.5, 1.5)
            nn.init.normal_(module.bias)
    return model.eval()


def groups(network):
    return [tuple(network.layers[i].name for i in group) for group in network.added]


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [("resnet8", {}, 32), ("resnet18-cifar", {"widths": [4, 8, 8, 8]}, 32), ("digits-cnn", {}, 8),
     ("wideresnet", {"depth": 10, "widen": 1}, 32), ("c1", {}, 32)],
)  # fmt: skip
def test_a_folded_network_computes_the_same(name, arguments, size):
    channels = 1 if name == "digits-cnn" else 3
    model = with_statistics(build(name, arguments, channels, size, 10))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    inputs = torch.randn(2, channels, size, size)
    network = trace(model, inputs[:1])
    with torch.no_grad():
        torch.testing.assert_close(network.folded(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    modules = dict(network.folded.named_modules())
    if name == "resnet8":
        assert not any(isinstance(module, nn.BatchNorm2d) for module in modules.values())


def test_layers_macs_and_additions_of_a_resnet():
    network = trace(ResNet20(), torch.randn(1, 3, 32, 32))
    first, last = network.layers[0], network.layers[-1]
    assert (first.name, first.parameters, first.macs) == ("conv1", 432, 432 * 32 * 32)
    assert (last.name, last.parameters, last.macs) == ("fc", 640, 640)
    assert len(network.layers) == 22
    assert [tuple(sorted(group)) for group in groups(network)] == [
        ("layer2.0.conv2", "layer2.0.downsample.0"),
        ("layer3.0.conv2", "layer3.0.downsample.0"),
    ]


def test_additions_of_torchvisions_resnet18():
    model = torchvision().models.resnet18()
    network = trace(model, torch.randn(1, 3, 64, 64))
    assert {frozenset(group) for group in groups(network)} == {
        frozenset({f"layer{n}.0.conv2", f"layer{n}.0.downsample.0"}) for n in (2, 3, 4)
    }


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() > 0 else x


def test_what_cannot_be_quantized_is_one_line():
    with pytest.raises(UsageError, match=r"Branching cannot be traced by torch\.fx"):
        trace(Branching(), torch.randn(1, 4))
    with pytest.raises(
        UsageError, match="Sequential has no convolution or linear layer to quantize"
    ):
        trace(nn.Sequential(nn.ReLU()), torch.randn(1, 4))


def test_a_norm_whose_layer_has_another_use_is_not_folded():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    model = with_statistics(Both())
    inputs = torch.randn(2, 1, 8, 8)
    network = trace(model, inputs[:1])
    torch.testing.assert_close(network.folded(inputs), model(inputs))
    assert network.added == ()


@pytest.mark.parametrize("parts", [4, 6])
def test_a_norm_over_the_parts_of_a_sample_is_not_folded(parts):
    """The parts are its channels, and the outputs of the linear layer are the last axis."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(parts))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    inputs = torch.randn(2, parts, 5)
    network = trace(model.eval(), inputs[:1])
    torch.testing.assert_close(network.folded(inputs), model(inputs))
