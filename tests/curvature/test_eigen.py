"""Lanczos and power iteration on operators whose eigenvalues are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc_absa.curvature.eigen import error_bound, lanczos, power

VALUES = st.one_of(
    st.floats(-100, 100, allow_subnormal=False),
    st.sampled_from([0.0, 1.0, 1.0, 5.0, -5.0, 50.0, 50.0001, -99.0]),
)


def operator(values, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(len(values), len(values), generator=generator, dtype=torch.float64)
    basis, _ = torch.linalg.qr(random)
    matrix = basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.T
    matrix = ((matrix + matrix.T) / 2).to(dtype)
    start = torch.randn(len(values), generator=generator, dtype=torch.float64).to(dtype)
    return (lambda v: matrix @ v), matrix, start


@settings(max_examples=60)
@given(st.lists(VALUES, min_size=2, max_size=24), st.integers(0, 99))
@example([0.0, 0.0, 0.0], 0)
@example([-1.0, -2.0, -3.0, -100.0], 0)
@example([5.0, 5.0, 5.0, 1.0], 0)
@example([1.0, 0.999999, 0.999998, 0.0, -50.0], 0)
def test_the_largest_eigenvalue_of_any_spectrum(values, seed):
    matvec, matrix, start = operator(values, seed)
    result = lanczos(matvec, [start], tol=1e-10, max_iter=400)
    scale = max(map(abs, values))
    assert result.top.converged
    vector = result.top.vector
    assert float(torch.linalg.vector_norm(vector)) == pytest.approx(1)
    residual = float(torch.linalg.vector_norm(matrix @ vector - result.top.value * vector))
    assert residual <= 2e-4 * scale + 1e-300
    # Values that lie as close together as 2e-4 of the scale may be taken for one another.
    cluster = max(max(values) - v for v in values if max(values) - v < 2e-4 * scale + 1e-300)
    assert result.top.value == pytest.approx(max(values), abs=1e-8 * scale + cluster + 1e-300)


@settings(max_examples=30)
@given(st.lists(VALUES, min_size=6, max_size=20), st.integers(0, 99))
def test_the_k_largest_eigenvalues(values, seed):
    matvec, _, start = operator(values, seed)
    result = lanczos(matvec, [start], tol=1e-9, max_iter=len(values), k=3)
    expected = sorted(values, reverse=True)[:3]
    scale = max(map(abs, values)) + 1e-300
    if len(result.pairs) == 3 and all(pair.converged for pair in result.pairs):
        for pair, value in zip(result.pairs, expected, strict=True):
            assert pair.value == pytest.approx(value, abs=1e-4 * scale)
    else:
        assert result.matvecs == len(values)


def test_float32():
    matvec, _, start = operator([3.0, 2.0, 1.0, 0.0, -7.0] * 5, dtype=torch.float32)
    result = lanczos(matvec, [start], tol=1e-5, max_iter=60)
    assert result.top.value == pytest.approx(3, rel=1e-5)
    assert result.lowest == pytest.approx(-7, rel=1e-3)


def test_zero_and_duplicate_starts_are_skipped():
    matvec, matrix, start = operator([float(v) for v in range(40)])
    top = torch.linalg.eigh(matrix)[1][:, -1]
    zero, near = torch.zeros_like(start), top + 0.02 * start
    result = lanczos(matvec, [zero, near, near, start], tol=1e-3, max_iter=40)
    alone = lanczos(matvec, [start], tol=1e-3, max_iter=40)
    assert result.matvecs < alone.matvecs
    assert result.top.value == pytest.approx(39, rel=1e-3)


def test_a_start_that_is_another_eigenvector():
    values = [9.0, 4.0, 1.0]
    result = lanczos(
        lambda v: torch.tensor(values, dtype=torch.float64) * v,
        [torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)],
        tol=1e-2,
        max_iter=10,
    )
    assert result.top.value == pytest.approx(9)


def test_too_few_products_do_not_converge():
    values = [1 + 1e-3 * i for i in range(60)]
    matvec, _, start = operator(values)
    result = lanczos(matvec, [start], tol=1e-9, max_iter=8)
    assert not result.top.converged
    assert result.matvecs == 8
    assert result.top.value < max(values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("solver", [lambda m, s, **k: lanczos(m, [s], **k), power])
def test_a_product_that_is_not_finite_gives_nan(solver, value):
    result = solver(lambda v: v * value, torch.ones(5), tol=1e-2, max_iter=10)
    assert math.isnan(result.top.value)
    assert not result.top.converged


def test_power_iteration_gives_the_largest_by_value():
    matvec, _, start = operator([5.0, 2.0, 1.0, -20.0])
    result = power(matvec, start, tol=1e-4, max_iter=500)
    assert result.top.converged
    assert result.top.value == pytest.approx(5, rel=1e-3)
    assert result.lowest == pytest.approx(-20, rel=1e-3)


def test_stop_ends_the_iteration():
    matvec, _, start = operator([float(v) for v in range(40)])
    result = lanczos(matvec, [start], tol=1e-9, max_iter=40, stop=lambda value: value > 30)
    assert result.stopped
    assert 30 < result.top.value < 39


def test_the_error_bound_is_the_smaller_of_two():
    assert error_bound(0.1, 2.0, 1.0) == pytest.approx(0.01)
    assert error_bound(0.1, 2.0, 1.99) == 0.1
    assert error_bound(0.1, 1.0, 2.0) == 0.1
