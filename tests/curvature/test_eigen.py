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
@given(st.lists(VALUES, min_size=2, max_size=24), st.integers(0, 99), st.booleans())
@example([0.0, 0.0, 0.0], 0, False)
@example([-1.0, -2.0, -3.0, -100.0], 0, False)
@example([5.0, 5.0, 5.0, 1.0], 0, True)
@example([1.0, 0.999999, 0.999998, 0.0, -50.0], 0, False)
def test_the_top_value_whatever_the_spectrum(values, seed, restart):
    matvec, matrix, start = operator(values, seed)
    found = lanczos(matvec, [start], tol=1e-10, max_iter=400, capacity=6 if restart else 0)
    scale = max(map(abs, values))
    assert found.top.converged
    vector = found.top.vector
    assert float(torch.linalg.vector_norm(vector)) == pytest.approx(1)
    residual = float(torch.linalg.vector_norm(matrix @ vector - found.top.value * vector))
    assert residual <= 2e-4 * scale + 1e-300
    # Values that lie as close together as 2e-4 of the scale may be taken for one another.
    cluster = max(max(values) - v for v in values if max(values) - v < 2e-4 * scale + 1e-300)
    assert found.top.value == pytest.approx(max(values), abs=1e-8 * scale + cluster + 1e-300)


@settings(max_examples=30)
@given(st.lists(VALUES, min_size=6, max_size=20), st.integers(0, 99))
def test_the_k_largest(values, seed):
    matvec, _, start = operator(values, seed)
    found = lanczos(matvec, [start], tol=1e-9, max_iter=len(values), k=3)
    expected = sorted(values, reverse=True)[:3]
    scale = max(map(abs, values)) + 1e-300
    if len(found.pairs) == 3 and all(pair.converged for pair in found.pairs):
        for pair, value in zip(found.pairs, expected, strict=True):
            assert pair.value == pytest.approx(value, abs=1e-4 * scale)
    else:
        assert found.matvecs == len(values)


def test_float32_finds_what_float32_can_tell():
    matvec, _, start = operator([3.0, 2.0, 1.0, 0.0, -7.0] * 5, dtype=torch.float32)
    found = lanczos(matvec, [start], tol=1e-5, max_iter=60)
    assert found.top.value == pytest.approx(3, rel=1e-5)
    assert found.lowest == pytest.approx(-7, rel=1e-3)


def test_several_starts_and_useless_ones():
    matvec, matrix, start = operator([float(v) for v in range(40)])
    top = torch.linalg.eigh(matrix)[1][:, -1]
    zero, near = torch.zeros_like(start), top + 0.02 * start
    found = lanczos(matvec, [zero, near, near, start], tol=1e-3, max_iter=40)
    alone = lanczos(matvec, [start], tol=1e-3, max_iter=40)
    assert found.matvecs < alone.matvecs
    assert found.top.value == pytest.approx(39, rel=1e-3)


def test_a_start_on_a_wrong_eigenvector_does_not_deceive():
    values = [9.0, 4.0, 1.0]
    found = lanczos(
        lambda v: torch.tensor(values, dtype=torch.float64) * v,
        [torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)],
        tol=1e-2,
        max_iter=10,
    )
    assert found.top.value == pytest.approx(9)


@pytest.mark.parametrize("restart", [0, 6])
def test_unfinished_says_so(restart):
    values = [1 + 1e-3 * i for i in range(60)]
    matvec, _, start = operator(values)
    found = lanczos(matvec, [start], tol=1e-9, max_iter=8, capacity=restart)
    assert not found.top.converged
    assert found.matvecs == 8
    assert found.top.value < max(values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("solver", [lambda m, s, **k: lanczos(m, [s], **k), power])
def test_what_is_not_finite_ends_it(solver, value):
    found = solver(lambda v: v * value, torch.ones(5), tol=1e-2, max_iter=10)
    assert math.isnan(found.top.value)
    assert not found.top.converged


def test_power_finds_the_largest_by_value():
    matvec, _, start = operator([5.0, 2.0, 1.0, -20.0])
    found = power(matvec, start, tol=1e-4, max_iter=500)
    assert found.top.converged
    assert found.top.value == pytest.approx(5, rel=1e-3)
    assert found.lowest == pytest.approx(-20, rel=1e-3)


def test_stop_is_asked_after_each_product():
    matvec, _, start = operator([float(v) for v in range(40)])
    found = lanczos(matvec, [start], tol=1e-9, max_iter=40, stop=lambda value: value > 30)
    assert found.stopped
    assert 30 < found.top.value < 39


def test_the_error_bound_is_the_better_of_two():
    assert error_bound(0.1, 2.0, 1.0) == pytest.approx(0.01)
    assert error_bound(0.1, 2.0, 1.99) == 0.1
    assert error_bound(0.1, 1.0, 2.0) == 0.1
