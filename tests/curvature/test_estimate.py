"""The estimate against a dense Hessian, and that it changes nothing in the model."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature import pieces
from hpc_absa.curvature.estimate import Interrupted, estimate_eigenvalue
from hpc_absa.curvature.operator import HessianOperator, evaluation_mode
from tests.curvature.nets import build, dense

SETTINGS = {"method": "lanczos", "samples": 20, "microbatch": 6, "tol": 1e-2, "max_iter": 20}


def estimate(model, loss, sample, **settings):
    return estimate_eigenvalue(model, loss, sample, SerialCommunicator(), **SETTINGS | settings)


def estimate_and_hessian(kind="conv", dtype=torch.float32, **settings):
    model, loss, sample = build(kind, dtype=dtype)
    return estimate(model, loss, sample, **settings), dense(model, loss, sample, 20)


@pytest.mark.parametrize("kind", ["conv", "attention", "mlp"])
@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_value_vector_and_residual(kind, method):
    result, hessian = estimate_and_hessian(kind, method=method)
    top = float(torch.linalg.eigvalsh(hessian)[-1])
    value, vector = result.eigenvalue, result.vector.double()
    assert value.converged
    assert value.value == pytest.approx(top, rel=1e-2)
    assert result.vector.dtype == torch.float32
    assert float(vector.norm()) == pytest.approx(1, abs=1e-5)
    residual = float((hessian @ vector - value.value * vector).norm()) / abs(value.value)
    assert value.residual == pytest.approx(residual, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("kind", ["conv", "attention", "mlp"])
def test_a_tight_tolerance_gives_an_accurate_vector(kind):
    result, hessian = estimate_and_hessian(kind, torch.float64, tol=1e-8, max_iter=60)
    values, vectors = torch.linalg.eigh(hessian)
    assert result.eigenvalue.value == pytest.approx(float(values[-1]), rel=1e-7)
    assert abs(float(vectors[:, -1] @ result.vector.double())) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("part", ["bias", "weight", "bn"])
def test_frozen_parameters(part):
    """Frozen convolutions with trained biases, and the other way round."""
    model, loss, sample = build("conv", dtype=torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    result = estimate(model, loss, sample, tol=1e-8, max_iter=60)
    top = float(torch.linalg.eigvalsh(dense(model, loss, sample, 20))[-1])
    assert result.eigenvalue.value == pytest.approx(top, rel=1e-6)


def test_the_previous_vector_saves_products():
    cold, _ = estimate_and_hessian("mlp", tol=1e-4, max_iter=60)
    warm, _ = estimate_and_hessian("mlp", tol=1e-4, max_iter=60, start=cold.vector)
    assert warm.eigenvalue.matvecs < cold.eigenvalue.matvecs
    assert warm.eigenvalue.value == pytest.approx(cold.eigenvalue.value, rel=1e-3)


def test_a_model_in_bfloat16():
    """Products are accurate to a percent; the search is in float32, and so are its bounds."""
    _, loss, sample = build("mlp", dtype=torch.bfloat16)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    value = estimate(model, loss, sample, tol=0.05).eigenvalue
    top = float(torch.linalg.eigvalsh(dense(model.double(), loss, sample, 20))[-1])
    assert value.value == pytest.approx(top, rel=0.1)
    assert value.error <= 0.051 or not value.converged


def test_too_few_products_do_not_converge():
    result, _ = estimate_and_hessian("mlp", tol=1e-6, max_iter=2)
    assert not result.eigenvalue.converged
    assert result.eigenvalue.matvecs == 2


def test_a_value_above_the_threshold_stops_the_search():
    full, _ = estimate_and_hessian("mlp", tol=1e-4, max_iter=60)
    value = full.eigenvalue.value
    above, _ = estimate_and_hessian("mlp", tol=1e-4, max_iter=60, threshold=value / 2)
    assert above.eigenvalue.stopped_above_threshold
    assert above.eigenvalue.matvecs < full.eigenvalue.matvecs
    below, _ = estimate_and_hessian("mlp", tol=1e-4, max_iter=60, threshold=value * 2)
    assert not below.eigenvalue.stopped_above_threshold
    assert below.eigenvalue.value == pytest.approx(value, rel=1e-4)


def _trained(kind, seed, steps, size):
    """A net after some steps on random data, its loss and sample, all drawn from the seed."""
    model, loss, sample = build(kind, size, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    if sample.inputs.is_floating_point():
        sample.inputs = torch.randn(sample.inputs.shape, generator=generator)
        sample.targets = sample.inputs.flatten(1)[:, :3].argmax(1)
    else:
        sample.inputs = torch.randint(0, 7, sample.inputs.shape, generator=generator)
        sample.targets = sample.inputs[:, 0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    optimizer = torch.optim.SGD(model.eval().parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        chosen = torch.randint(0, size, (32,), generator=generator)
        optimizer.zero_grad()
        loss(model(sample.inputs[chosen]), sample.targets[chosen]).backward()
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model, loss, sample


def _outside(seeds, tolerances, size, kinds=("mlp", "conv", "attention")):
    """(estimates outside the tolerance, converged estimates) on small nets with `size` samples."""
    wrong = converged = 0
    for seed in seeds:
        kind, steps = kinds[seed % len(kinds)], [0, 20, 100][seed // 3 % 3]
        model, loss, sample = _trained(kind, seed, steps, size)
        top = float(torch.linalg.eigvalsh(dense(model, loss, sample, size))[-1])
        for tol in tolerances:
            value = estimate(
                model, loss, sample, samples=size, microbatch=16, tol=tol, max_iter=80
            ).eigenvalue
            converged += value.converged
            wrong += value.converged and value.value < top - max(tol, 1e-5) * value.value
    return wrong, converged


@pytest.mark.slow
@pytest.mark.parametrize("size", [24, 96])
def test_converged_estimates_are_within_the_tolerance(size):
    wrong, converged = _outside(range(18), [0.1, 1e-2, 1e-4], size, ["mlp"])
    assert converged >= 50
    assert wrong <= 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("size", [24, 96, 256])
def test_at_most_1_in_200_converged_estimates_is_outside_the_tolerance(size):
    wrong, converged = _outside(range(60), [0.1, 0.05, 0.02, 1e-2, 1e-3, 1e-4], size)
    print(f"\n{size} samples: {wrong} of {converged} outside the tolerance")
    assert converged > 300
    assert wrong <= converged / 200


def test_a_large_sample_is_searched_from_a_coarse_one(monkeypatch):
    model, loss, sample = build("conv", 64, torch.float32)
    settings = {"samples": 64, "microbatch": 16}
    assert estimate(model, loss, sample, **settings).coarse_matvecs == 0  # small kernels
    monkeypatch.setattr(pieces, "COARSE_BYTES", 0)
    result = estimate(model, loss, sample, **settings)
    assert result.coarse_matvecs > 0
    top = float(torch.linalg.eigvalsh(dense(model, loss, sample, 64))[-1])
    assert result.eigenvalue.value == pytest.approx(top, rel=1e-2)
    above = estimate(model, loss, sample, **settings, threshold=top / 4).eigenvalue
    assert above.stopped_above_threshold
    assert not above.converged


def test_a_coarse_sample_without_targets_is_left_out(monkeypatch):
    monkeypatch.setattr(pieces, "COARSE_BYTES", 0)
    model, loss, sample = build("mlp", 64, torch.float32)
    sample.targets[:16] = -100
    value = estimate(model, loss, sample, samples=64, microbatch=16, max_iter=60).eigenvalue
    top = float(torch.linalg.eigvalsh(dense(model, loss, sample, 64))[-1])
    assert value.converged
    assert value.value == pytest.approx(top, rel=1e-2)


def test_a_sample_that_is_smaller_than_the_smallest_coarse_one(monkeypatch):
    """The previous vector is tested on all of it."""
    monkeypatch.setattr(pieces, "COARSE_BYTES", 0)
    model, loss, sample = build("mlp", 10, torch.float32)
    settings = {"samples": 10, "tol": 1e-4, "max_iter": 60}
    full = estimate(model, loss, sample, **settings)
    threshold = full.eigenvalue.value / 2
    above = estimate(model, loss, sample, **settings, threshold=threshold, start=full.vector)
    assert above.eigenvalue.stopped_above_threshold
    assert (above.eigenvalue.samples, above.eigenvalue.matvecs) == (10, 1)


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_diverged_model_has_no_eigenvalue(method, broken):
    model, loss, sample = build("conv", dtype=torch.float32)
    with torch.no_grad():
        model.head.weight[0, 0] = broken
    result = estimate(model, loss, sample, method=method)
    assert math.isnan(result.eigenvalue.value)
    assert not result.eigenvalue.converged


def test_the_sampling_error_is_the_scatter_over_samples():
    model, loss, sample = build("mlp", dtype=torch.float64)
    result = estimate(model, loss, sample, samples=24, threshold=1e6)
    vector = result.vector.double()
    values = []
    for start in range(24):
        part = type(sample)(*sample.load(start, start + 1))
        values.append(float(vector @ dense(model, loss, part, 1) @ vector))
    expected = np.std(values, ddof=1) / math.sqrt(24)
    assert result.eigenvalue.sampling_error == pytest.approx(expected, rel=1e-3)


def _state(model):
    tensors = [t.clone() for t in [*model.parameters(), *model.buffers()]]
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [module.training for module in model.modules()]
    state = np.random.get_state()
    return tensors, gradients, flags, torch.get_rng_state(), random.getstate(), state[1].tolist()


def _same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


class _Impure(nn.Module):
    """Writes to a buffer and its inputs, draws random numbers in evaluation mode; may raise."""

    def __init__(self, inner, error=None):
        super().__init__()
        self.inner, self.error = inner, error
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        x *= 0.5
        y = self.inner(x + 0 * torch.rand_like(x) + 0 * random.random() + 0 * np.random.rand())
        if self.error is not None:
            raise self.error
        return y


@pytest.mark.parametrize("ending", ["result", "exception", "interruption"])
def test_nothing_is_changed(ending):
    model, loss, sample = build("conv", dtype=torch.float32)
    # as the operator arranges them, so that it has no other reason to copy
    sample.inputs = sample.inputs.contiguous(memory_format=torch.channels_last)
    model = _Impure(model, RuntimeError("boom") if ending == "exception" else None)
    fired = []
    for index, parameter in enumerate(model.parameters()):
        parameter.register_hook(fired.append)
        parameter.register_post_accumulate_grad_hook(fired.append)
        if index % 2:
            parameter.grad = torch.randn_like(parameter)
    model.inner.bn1.eval()
    before, inputs = _state(model), sample.inputs.clone()
    poll = (lambda: True) if ending == "interruption" else None
    try:
        estimate(model, loss, sample, poll=poll)
    except RuntimeError as error:
        assert str(error) == "boom"  # noqa: PT017
    except Interrupted:
        assert ending == "interruption"
    assert _same(before, _state(model))
    assert torch.equal(sample.inputs, inputs)
    assert not fired


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 25}, "samples: expected 1 to 24"),
        ({"microbatch": 0}, "microbatch: expected 1 or more"),
        ({"method": "qr"}, "method: expected 'lanczos' or 'power', got 'qr'"),
    ],
)
def test_an_invalid_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        estimate_and_hessian(**change)


class _Nested(nn.Module):
    """Takes and returns dicts; one input has no batch dimension."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        return {"outputs": [self.inner(inputs["x"] * inputs["scale"])]}


def test_inputs_targets_and_outputs_of_any_structure():
    model, loss, sample = build("conv", dtype=torch.float64)
    plain = estimate(model, loss, sample)
    load = sample.load

    def nested_load(start, stop):
        inputs, targets = load(start, stop)
        return {"x": inputs / 2, "scale": torch.full((8, 8), 2.0).double()}, [targets]

    sample.load = nested_load
    nested = estimate(_Nested(model), lambda o, t: loss(o["outputs"][0], t[0]), sample)
    assert nested.eigenvalue.value == plain.eigenvalue.value


def test_accelerated_products_equal_autograd():
    model, loss, sample = build("conv", dtype=torch.float64)

    def product(accelerate):
        operator = HessianOperator(
            model, loss, sample, SerialCommunicator(),
            samples=20, microbatch=6, accelerate=accelerate,
        )  # fmt: skip
        return operator.matvec(operator.gradient())

    with evaluation_mode(model):
        torch.testing.assert_close(product(True), product(False))
