"""The estimate: right value, no trace left in the model, honest about what it does not know."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.probe import Interrupted, estimate
from tests.curvature.nets import build, dense

SETTINGS = {"method": "lanczos", "samples": 20, "microbatch": 6, "tol": 1e-2, "max_iter": 20}


def probe(kind="conv", dtype=torch.float32, **settings):
    model, loss, sample = build(kind, dtype=dtype)
    found = estimate(model, loss, sample, SerialCommunicator(), **SETTINGS | settings)
    return found, dense(model, loss, sample, settings.get("samples", 20))


@pytest.mark.parametrize("kind", ["conv", "attention", "mlp"])
@pytest.mark.parametrize("method", ["lanczos", "power"])
def test_agrees_with_the_dense_hessian(kind, method):
    found, hessian = probe(kind, method=method)
    truth = float(torch.linalg.eigvalsh(hessian)[-1])
    assert found.eigenvalue.converged
    assert found.eigenvalue.value == pytest.approx(truth, rel=1e-2)
    assert found.vector.dtype == torch.float32
    assert float(torch.linalg.vector_norm(found.vector)) == pytest.approx(1, abs=1e-5)
    product = hessian @ found.vector.double()
    residual = product - found.eigenvalue.value * found.vector.double()
    expected = float(torch.linalg.vector_norm(residual)) / abs(found.eigenvalue.value)
    assert found.eigenvalue.residual == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("kind", ["conv", "attention", "mlp"])
def test_a_tight_tolerance_gives_the_vector_too(kind):
    found, hessian = probe(kind, torch.float64, tol=1e-8, max_iter=60)
    values, vectors = torch.linalg.eigh(hessian)
    assert found.eigenvalue.value == pytest.approx(float(values[-1]), rel=1e-7)
    assert abs(float(vectors[:, -1] @ found.vector.double())) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("part", ["bias", "weight", "bn"])
def test_where_only_some_parameters_are_trained(part):
    """Frozen convolutions with trained biases, and the other way round."""
    model, loss, sample = build("conv", dtype=torch.float64)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
    settings = SETTINGS | {"tol": 1e-8, "max_iter": 60}
    found = estimate(model, loss, sample, SerialCommunicator(), **settings)
    truth = float(torch.linalg.eigvalsh(dense(model, loss, sample, 20))[-1])
    assert found.eigenvalue.value == pytest.approx(truth, rel=1e-6)


def test_starts_from_the_last_vector():
    cold, _ = probe("mlp", tol=1e-4, max_iter=60)
    warm, _ = probe("mlp", tol=1e-4, max_iter=60, start=cold.vector)
    assert warm.eigenvalue.matvecs < cold.eigenvalue.matvecs
    assert warm.eigenvalue.value == pytest.approx(cold.eigenvalue.value, rel=1e-3)


def test_too_few_products_are_no_convergence():
    found, _ = probe("mlp", tol=1e-6, max_iter=2)
    assert not found.eigenvalue.converged
    assert found.eigenvalue.matvecs == 2


def test_a_value_above_the_threshold_settles_the_question():
    full, _ = probe("mlp", tol=1e-4, max_iter=60)
    found, _ = probe("mlp", tol=1e-4, max_iter=60, threshold=full.eigenvalue.value / 2)
    assert found.stopped_above_threshold
    assert found.eigenvalue.matvecs < full.eigenvalue.matvecs
    below, _ = probe("mlp", tol=1e-4, max_iter=60, threshold=full.eigenvalue.value * 2)
    assert not below.stopped_above_threshold
    assert below.eigenvalue.value == pytest.approx(full.eigenvalue.value, rel=1e-4)


@pytest.mark.parametrize("method", ["lanczos", "power"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_model_has_no_eigenvalue(method, broken):
    model, loss, sample = build("conv", dtype=torch.float32)
    with torch.no_grad():
        model.head.weight[0, 0] = broken
    found = estimate(model, loss, sample, SerialCommunicator(), **SETTINGS | {"method": method})
    assert math.isnan(found.eigenvalue.value)
    assert not found.eigenvalue.converged


def test_the_sampling_error_is_that_of_the_microbatches_own_values():
    model, loss, sample = build("mlp", dtype=torch.float64)
    found = estimate(model, loss, sample, SerialCommunicator(), **SETTINGS | {"samples": 24})
    vector = found.vector.double()
    own = []
    for start in range(0, 24, 6):
        part = type(sample)(*sample.load(start, start + 6))
        own.append(float(vector @ dense(model, loss, part, 6) @ vector))
    assert found.sampling_error == pytest.approx(np.std(own, ddof=1) / math.sqrt(4), rel=1e-4)


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


class _Untidy(torch.nn.Module):
    """Writes to a buffer and draws random numbers in evaluation mode; may raise."""

    def __init__(self, inner, error=None):
        super().__init__()
        self.inner, self.error = inner, error
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        y = self.inner(x + 0 * torch.rand_like(x) + 0 * random.random() + 0 * np.random.rand())
        if self.error is not None:
            raise self.error
        return y


@pytest.mark.parametrize("ending", ["result", "exception", "interruption"])
def test_the_model_is_left_bit_for_bit(ending):
    model, loss, sample = build("conv", dtype=torch.float32)
    model = _Untidy(model, RuntimeError("boom") if ending == "exception" else None)
    fired = []
    for index, parameter in enumerate(model.parameters()):
        parameter.register_hook(fired.append)
        parameter.register_post_accumulate_grad_hook(fired.append)
        if index % 2:
            parameter.grad = torch.randn_like(parameter)
    model.inner.bn1.eval()
    before = _state(model)
    poll = (lambda: True) if ending == "interruption" else None
    try:
        estimate(model, loss, sample, SerialCommunicator(), **SETTINGS, poll=poll)
    except RuntimeError as error:
        assert str(error) == "boom"  # noqa: PT017
    except Interrupted:
        assert ending == "interruption"
    assert _same(before, _state(model))
    assert not fired


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 25}, "samples: expected 1 to 24"),
        ({"microbatch": 0}, "microbatch: expected 1 or more"),
        ({"method": "qr"}, "method: expected 'lanczos' or 'power', got 'qr'"),
    ],
)
def test_a_wrong_argument_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        probe(**change)


def test_a_large_sample_is_searched_from_a_small_one():
    model, loss, sample = build("conv", 64, torch.float32)
    settings = SETTINGS | {"samples": 64, "microbatch": 16}
    found = estimate(model, loss, sample, SerialCommunicator(), **settings)
    assert found.coarse_matvecs > 0
    truth = float(torch.linalg.eigvalsh(dense(model, loss, sample, 64))[-1])
    assert found.eigenvalue.value == pytest.approx(truth, rel=1e-2)
    stopped_above_threshold = estimate(
        model, loss, sample, SerialCommunicator(), **settings, threshold=truth / 4
    )
    assert stopped_above_threshold.stopped_above_threshold
    assert stopped_above_threshold.eigenvalue.samples == 16
    assert not stopped_above_threshold.eigenvalue.converged
