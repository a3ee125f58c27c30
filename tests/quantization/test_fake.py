"""Fake quantization: values, errors, gradients and ranges."""

import pytest
import torch
from torch import nn

from hpc_absa.quantization import fake, torch_ao
from hpc_absa.quantization.fake import Range, quantized_activation, quantized_weight, squared_error
from hpc_absa.quantization.graph import trace


def test_a_weight_takes_few_values_in_each_channel():
    weight = torch.randn(3, 40)
    for bits in (2, 4, 8):
        values = quantized_weight(weight, bits)
        scale = weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
        steps = values / scale
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert ((values - weight).abs() <= scale / 2 + 1e-6).all()
    assert not quantized_weight(torch.zeros(2, 3), 4).any()


def test_scaling_a_channel_commutes_with_quantization():
    """So that folding a batch norm does not change what is rounded to what."""
    weight, scale = torch.randn(5, 4, 3, 3), torch.randn(5, 1, 1, 1)
    torch.testing.assert_close(
        quantized_weight(scale * weight, 4), scale * quantized_weight(weight, 4)
    )


def test_the_error_at_4_bits_is_some_329_times_that_at_8():
    torch.manual_seed(0)
    weight = torch.randn(8, 4000)
    assert squared_error(weight, 4) / squared_error(weight, 8) == pytest.approx(
        (127 / 7) ** 2, rel=0.03
    )


def test_activations_are_clipped_and_zero_is_exact():
    x = torch.tensor([-3.0, 0.0, 0.4, 7.0], requires_grad=True)
    y = quantized_activation(x, torch.tensor(-1.0), torch.tensor(2.0), 2)
    assert y.tolist() == [-1, 0, 0, 2]
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]


def test_the_gradient_passes_through_the_rounding():
    weight = torch.randn(2, 3, requires_grad=True)
    factors = torch.randn(2, 3)
    (quantized_weight(weight, 4) * factors).sum().backward()
    assert torch.equal(weight.grad, factors)


def test_ranges_follow_the_activations():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 3)).eval()
    inputs = torch.rand(50, 1, 8, 8) - 0.25
    network = trace(model, inputs[:1])
    ranges = fake.calibrate(network, inputs.split(20), (4, 8))
    assert ranges["0"][8].low == pytest.approx(-0.25, abs=0.03)
    assert ranges["0"][8].high == pytest.approx(0.75, abs=0.05)
    assert ranges["3"][8].low == 0
    assert ranges["3"][4].high <= ranges["3"][8].high
    quantized = fake.quantized(network, {"0": 8, "3": 8}, ranges)
    coarse = fake.quantized(network, {"0": 2, "3": 8}, {**ranges, "0": {2: Range(-0.25, 0.75)}})
    with torch.no_grad():
        exact = model(inputs)
        close, far = (quantized(inputs) - exact).norm(), (coarse(inputs) - exact).norm()
    assert close < 0.02 * exact.norm() < far


@pytest.mark.parametrize("pixels", [32, 49])
def test_ranges_are_chosen_from_all_pixels(pixels):
    """Every 32nd value of images with 32 columns would be of the first one."""
    column = torch.arange(pixels, dtype=torch.float32).repeat(1 << 16)
    assert len(fake._sampled(column).unique()) == pixels


@pytest.mark.skipif(not torch_ao.available(), reason="torch.ao.quantization is not in this torch")
def test_the_configuration_is_one_that_torch_ao_takes():
    from torch.ao.quantization.quantize_fx import prepare_qat_fx

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 36, 3))
    inputs = torch.randn(4, 1, 8, 8)
    prepared = prepare_qat_fx(model.train(), torch_ao.qconfig_mapping({"0": 4, "3": 8}), (inputs,))
    prepared(inputs)
    first = dict(prepared.named_modules())["0"]
    values = first.weight_fake_quant(first.weight)
    torch.testing.assert_close(values, quantized_weight(model[0].weight, 4), rtol=1e-4, atol=1e-5)
