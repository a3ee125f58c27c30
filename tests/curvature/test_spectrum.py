"""Top eigenvalues, trace, density, layers and slices against a dense float64 Hessian."""

from __future__ import annotations

import io
import json
import math

import h5py
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature import export
from hpc_absa.curvature.export import save, to_dict
from hpc_absa.curvature.operator import (
    HessianOperator,
    Interrupted,
    evaluation_mode,
    trainable_parameters,
)
from hpc_absa.curvature.plot import draw
from hpc_absa.curvature.spectrum import spectrum
from hpc_absa.curvature.stochastic import hutchpp_trace, random_vector, spectral_density
from hpc_absa.errors import UsageError
from tests.curvature.nets import build, dense
from tests.curvature.test_eigen import VALUES, operator


@pytest.fixture(scope="module")
def computed():
    model, loss, sample = build("conv", dtype=torch.float64)
    result = spectrum(
        model, loss, sample, SerialCommunicator(),
        samples=20, microbatch=6, k=4, tol=1e-6, max_iter=200, trace_matvecs=60,
        density_steps=30, density_probes=6, slice_points=5,
    )  # fmt: skip
    return result, dense(model, loss, sample, 20), model, loss, sample


def test_top_values_and_vectors(computed):
    result, hessian, *_ = computed
    values, vectors = torch.linalg.eigh(hessian)
    expected = values.flip(0)[:4].numpy()
    assert result.top.converged.all()
    np.testing.assert_allclose(result.top.values, expected, rtol=1e-6)
    cosines = np.abs(result.top.vectors @ vectors.flip(1)[:, :4].numpy()).diagonal()
    np.testing.assert_allclose(cosines, 1, atol=1e-4)


def test_trace_is_within_its_error(computed):
    result, hessian, *_ = computed
    truth = float(hessian.trace())
    assert abs(result.trace.value - truth) <= 3 * result.trace.error + 1e-9
    assert result.trace.error < 0.05 * abs(truth)


def test_density_integrates_to_one_and_counts_negative_directions(computed):
    result, hessian, *_ = computed
    density, values = result.density, torch.linalg.eigvalsh(hessian).numpy()
    assert np.trapezoid(density.density, density.grid) == pytest.approx(1, abs=1e-3)
    truth = float((values < -density.cutoff).mean())
    assert density.negative_low <= density.negative <= density.negative_high
    assert density.negative_low - 0.02 <= truth <= density.negative_high + 0.02
    least = (values < -density.cutoff).sum()
    assert 0 < density.negative_least <= least
    assert result.lowest >= values[0] - 1e-9
    _, low, high = density.below(float(values[-1]) / 2)
    assert low - 0.01 <= float((values < values[-1] / 2).mean()) <= high + 0.01
    gaussians = np.exp(-0.5 * ((density.grid[:, None] - values) / density.width) ** 2)
    exact = gaussians.mean(1) / (density.width * math.sqrt(2 * math.pi))
    distance = np.trapezoid(np.abs(exact - density.density), density.grid)
    assert distance < 0.15


def test_each_layers_diagonal_block(computed):
    result, hessian, model, *_ = computed
    start = 0
    for layer, (name, parameter) in zip(
        result.layers, trainable_parameters(model).items(), strict=True
    ):
        stop = start + parameter.numel()
        block = hessian[start:stop, start:stop]
        assert layer.name == name
        if layer.converged:
            top = float(torch.linalg.eigvalsh(block)[-1])
            assert layer.top == pytest.approx(top, rel=1e-4, abs=1e-12)
        trace, density = layer.trace, layer.density
        assert abs(trace.value - float(block.trace())) <= 5 * trace.error + 1e-9
        negative = float((torch.linalg.eigvalsh(block) < -density.cutoff).double().mean())
        assert density.negative_low - 0.2 <= negative <= density.negative_high + 0.2
        start = stop
    assert sum(layer.converged for layer in result.layers) >= len(result.layers) / 2


def test_the_loss_along_the_top_vectors(computed):
    result, _, model, loss, sample = computed
    model.eval()
    inputs, targets = sample.load(0, 20)
    assert result.loss == pytest.approx(loss(model(inputs), targets).item())
    assert len(result.slices) == 2
    for line in result.slices:
        assert line.losses[2] == pytest.approx(result.loss)
    model.train()


def test_json_figure_and_hdf5(computed, tmp_path):
    result = computed[0]
    plain = json.loads(json.dumps(to_dict(result), allow_nan=False))
    assert plain["top"]["values"] == result.top.values.tolist()
    assert "vectors" not in plain["top"]
    draw(result, tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").stat().st_size > 1000
    save(result, tmp_path / "spectrum.h5")
    with h5py.File(tmp_path / "spectrum.h5") as file:
        assert file["top/vectors"].shape == (4, result.parameters)
        assert file["trace"].attrs["value"] == result.trace.value
        assert file["layers/0000"].attrs["name"] == result.layers[0].name


def test_a_model_whose_loss_is_not_finite_has_a_figure(tmp_path):
    model, loss, sample = build("mlp", dtype=torch.float32)
    with torch.no_grad():
        model[-1].weight[0, 0] = math.inf
    result = spectrum(
        model, loss, sample, SerialCommunicator(), samples=20, microbatch=6, k=2,
        trace_matvecs=6, density_steps=4, density_probes=2,
    )  # fmt: skip
    assert np.isnan(result.top.values).all()
    draw(result, tmp_path / "spectrum.png")
    assert (tmp_path / "spectrum.png").stat().st_size > 1000


def test_files_that_are_not_a_spectrum_are_not_replaced(computed, tmp_path):
    tables, figure = tmp_path / "s.h5", tmp_path / "s.png"
    export.require_replaceable(tables, figure)
    figure.write_bytes(b"a picture")
    with pytest.raises(UsageError, match=r"s\.png: exists and is not a spectrum"):
        export.require_replaceable(tables, figure)
    save(computed[0], tables)
    export.require_replaceable(tables, figure)
    tables.write_bytes(b"a table")
    with pytest.raises(UsageError, match=r"s\.h5: exists and is not a spectrum"):
        export.require_replaceable(tables, figure)
    with pytest.raises(UsageError, match=r"s\.h5: no folder .* to write to"):
        export.require_replaceable(tmp_path / "no" / "s.h5", tmp_path / "no" / "s.png")


def test_tables(computed):
    result = computed[0]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(export.heading(result), *export.tables(result))
    text = console.export_text()
    density = result.density
    for value in (*result.top.values, *(line.losses[-1] for line in result.slices)):
        assert f"{value:.4g}"[:4] in text
    low, high = (
        round(share * result.parameters) for share in (density.negative_low, density.negative_high)
    )
    assert f"between {max(low, density.negative_least)} and {high};" in text
    assert all(layer.name in text for layer in result.layers)
    for share in density.below(export.DENSITY_LIMITS[0] * result.top.values[0]):
        assert f"{100 * share:.2f} %" in text


def test_trace_is_exact_where_the_sketch_spans_the_range():
    matvec, matrix, start = operator([7.0, -3.0, 2.0] + [0.0] * 30)
    trace = hutchpp_trace(matvec, start, matvecs=15)
    assert trace.value == pytest.approx(float(matrix.trace()))


@pytest.mark.parametrize("size", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("seed", range(8))
def test_trace_of_a_small_operator_is_exact(size, seed):
    """Random signs of few elements are often linearly dependent."""
    values = np.random.default_rng(seed).normal(size=size)
    matvec, matrix, start = operator(values.tolist(), seed)
    trace = hutchpp_trace(matvec, start, matvecs=9, seed=seed)
    assert trace.value == pytest.approx(float(matrix.trace()), rel=1e-6, abs=1e-6)
    assert trace.error == 0
    assert trace.matvecs == size


def test_trace_of_a_small_operator_that_is_not_finite():
    trace = hutchpp_trace(lambda v: v * torch.nan, torch.zeros(3), matvecs=9)
    assert np.isnan(trace.value)


@settings(max_examples=40)
@given(st.lists(VALUES, min_size=2, max_size=30), st.integers(0, 99), st.floats(-60, 60))
def test_bounds_of_the_share_hold_for_any_spectrum(values, seed, limit):
    """Few steps, so that nodes stand for many eigenvalues; exact is the probe's measure."""
    matvec, matrix, start = operator(values, seed)
    density = spectral_density(matvec, start, steps=4, probes=1, seed=seed)
    exact, vectors = torch.linalg.eigh(matrix)
    assume(bool((exact - limit).abs().min() > 1e-6))
    probe = random_vector(start, seed)
    measure = (vectors.T @ (probe / probe.norm())) ** 2
    _, low, high = density.below(limit)
    assert low - 1e-6 <= float(measure[exact < limit].sum()) <= high + 1e-6
    assert density.negative_least <= int((exact < 0).sum())


def test_density_of_a_zero_operator():
    density = spectral_density(torch.zeros_like, torch.zeros(9), steps=5, probes=2)
    assert np.trapezoid(density.density, density.grid) == pytest.approx(1, abs=1e-3)
    assert density.negative == 0


@pytest.mark.parametrize("kind", ["conv", "attention", "mlp"])
def test_gauss_newton(kind):
    """`Jᵀ H_f J` from the dense Jacobian and the softmax's own Hessian."""
    model, loss, sample = build(kind, dtype=torch.float64)
    with evaluation_mode(model):
        op = HessianOperator(
            model, loss, sample, SerialCommunicator(),
            samples=20, microbatch=6, matrix="gauss-newton",
        )  # fmt: skip
        generator = torch.Generator().manual_seed(1)
        vector = torch.randn(op.size, generator=generator, dtype=torch.float64)
        product = op.matvec(vector)
        names = trainable_parameters(model)
        inputs, _ = sample.load(0, 20)
        shaped = [v.view_as(p) for v, p in zip(
            vector.split([p.numel() for p in names.values()]), names.values(), strict=True
        )]  # fmt: skip

        def outputs(*parameters):
            return torch.func.functional_call(
                model, dict(zip(names, parameters, strict=True)), (inputs,)
            )

        f, tangent = torch.autograd.functional.jvp(outputs, tuple(names.values()), tuple(shaped))
        p = f.softmax(1)
        bent = (p * tangent - p * (p * tangent).sum(1, keepdim=True)) / 20
        expected = torch.autograd.functional.vjp(outputs, tuple(names.values()), bent)[1]
    torch.testing.assert_close(product, torch.cat([e.reshape(-1) for e in expected]))


def test_poll_interrupts():
    model, loss, sample = build("mlp")
    with pytest.raises(Interrupted):
        spectrum(
            model, loss, sample, SerialCommunicator(),
            samples=20, microbatch=6, poll=lambda: True,
        )  # fmt: skip
    assert model.training
