"""Lanczos and power iteration on operators whose eigenvalues are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hpc_absa.curvature.eigen import (
    Lanczos,
    LanczosPolynomials,
    error_bound,
    lanczos,
    random_overlap,
    randomized,
)
from hpc_absa.curvature.leading import leading
from hpc_absa.curvature.power import power

VALUES = st.one_of(
    # Squares of values below 1e-154 underflow, and with them norms.
    st.floats(-100, 100).map(lambda value: value if abs(value) > 1e-100 else 0.0),
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
    result = lanczos(matvec, start, tol=1e-10, max_iter=400)
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
    result = leading(matvec, [start], tol=1e-9, max_iter=len(values), k=3)
    expected = sorted(values, reverse=True)[:3]
    scale = max(map(abs, values)) + 1e-300
    if len(result.pairs) == 3 and all(pair.converged for pair in result.pairs):
        for pair, value in zip(result.pairs, expected, strict=True):
            assert pair.value == pytest.approx(value, abs=1e-4 * scale)
    else:
        assert result.matvecs == len(values)


def test_float32():
    matvec, _, start = operator([3.0, 2.0, 1.0, 0.0, -7.0] * 5, dtype=torch.float32)
    result = lanczos(matvec, start, tol=1e-5, max_iter=60)
    assert result.top.value == pytest.approx(3, rel=1e-5)
    assert result.lowest == pytest.approx(-7, rel=1e-3)


def test_zero_and_duplicate_starts_are_skipped():
    matvec, matrix, start = operator([float(v) for v in range(40)])
    top = torch.linalg.eigh(matrix)[1][:, -1]
    zero, near = torch.zeros_like(start), top + 0.02 * start
    result = leading(matvec, [zero, near, near, start], tol=1e-3, max_iter=40, k=1)
    alone = leading(matvec, [start], tol=1e-3, max_iter=40, k=1)
    assert result.matvecs < alone.matvecs
    assert result.top.value == pytest.approx(39, rel=1e-3)


def test_a_start_that_is_another_eigenvector():
    values = [9.0, 4.0, 1.0]
    result = lanczos(
        lambda v: torch.tensor(values, dtype=torch.float64) * v,
        randomized(torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)),
        tol=1e-2,
        max_iter=10,
    )
    assert result.top.value == pytest.approx(9)


def test_too_few_products_do_not_converge():
    values = [1 + 1e-3 * i for i in range(60)]
    matvec, _, start = operator(values)
    result = lanczos(matvec, start, tol=1e-9, max_iter=8)
    assert not result.top.converged
    assert result.matvecs == 8
    assert result.top.value < max(values)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("solver", [lanczos, power])
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


def test_a_value_above_the_threshold_ends_the_iteration():
    matvec, _, start = operator([float(v) for v in range(40)])
    result = lanczos(matvec, start, tol=1e-9, max_iter=40, threshold=30)
    assert result.stopped
    assert 30 < result.top.value < 39


def test_a_search_goes_on_until_its_upper_bound_is_below_a_limit():
    matvec, _, start = operator([1 - 0.02 * i for i in range(40)])
    search = Lanczos(matvec, start, max_iter=40)
    rough = search.run(tol=0.5)
    assert rough.top.converged
    assert rough.top.value * (1 + rough.top.error) > 1.01
    result = search.separate(0.5, 1.01)
    assert result.top.converged
    assert result.top.value * (1 + result.top.error) <= 1.01
    assert result.matvecs > rough.matvecs
    assert search.separate(0.5, 1.01).matvecs == result.matvecs
    assert search.separate(0.5, 0.99).top.value > 0.99


@settings(max_examples=100)
@given(st.lists(VALUES, min_size=2, max_size=24, unique=True), st.integers(0, 99))
def test_the_upper_bound_excludes_no_eigenvalue_of_sufficient_overlap(values, seed):
    """With the true overlap of the top eigenvector the bound holds whatever the spectrum is."""
    values = torch.tensor(sorted(values), dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    vector = torch.randn(len(values), generator=generator, dtype=torch.float64)
    vector /= vector.norm()
    overlap, scale = abs(float(vector[-1])), float(values.abs().max())
    alphas, betas, basis = [], [], [vector]
    for _ in range(len(values) - 1):
        image = values * basis[-1]
        alphas.append(float(basis[-1] @ image))
        for _ in range(2):
            image = image - torch.stack(basis).T @ (torch.stack(basis) @ image)
        betas.append(float(image.norm()))
        if betas[-1] < 1e-6 * scale:
            break
        basis.append(image / betas[-1])
        off = torch.tensor(betas[:-1], dtype=torch.float64)
        matrix = torch.diag(torch.tensor(alphas, dtype=torch.float64))
        matrix += torch.diag(off, 1) + torch.diag(off, -1)
        top = float(torch.linalg.eigvalsh(matrix)[-1])
        bound = LanczosPolynomials(alphas, betas).upper_bound(top, overlap)
        assert bound >= float(values[-1]) - 1e-5 * scale


def _spectrum(kind, random):
    """A spectrum of at most 120 values, largest anywhere."""
    n = int(random.integers(20, 120))
    if kind == "clustered":
        top = 1 - random.random(int(random.integers(2, 8))) * 10 ** random.uniform(-3, -0.3)
        return np.r_[top, random.random(n) * random.uniform(0.1, 0.9)]
    if kind == "gap of 9 %":
        return np.r_[1.0, 0.91, random.uniform(-0.5, 0.5, n)]
    if kind == "negative":
        return -np.r_[random.uniform(0.1, 1, 5), random.uniform(1, 10, n)]
    if kind == "mixed signs":
        return np.r_[1.0, random.uniform(-random.uniform(0.2, 3), 0.8, n)]
    if kind == "repeated":
        return np.repeat(random.uniform(-1, 1, 6), n // 6 + 1)
    if kind == "decaying":
        return np.r_[random.uniform(0.5, 1) ** np.arange(20), 0.02 * random.standard_normal(n)]
    return random.uniform(-1, 1, int(random.integers(2, 12)))


KINDS = ["clustered", "gap of 9 %", "negative", "mixed signs", "repeated", "decaying", "tiny"]


def outside(trials, tol, start_kind, seed):
    """(estimates outside the tolerance, converged ones, products), over all kinds of spectra."""
    random, wrong, converged, products = np.random.default_rng(seed), 0, 0, 0
    for trial in range(trials):
        for kind in KINDS:
            values = torch.from_numpy(np.sort(_spectrum(kind, random))[::-1].copy())
            start = torch.zeros_like(values)
            if start_kind == "second":
                start[1] = 1  # the worst case: all but the noise along the second eigenvector
            start = randomized(start, seed=seed * trials + trial)
            result = lanczos(lambda v, d=values: d * v, start, tol=tol, max_iter=60)
            if result.top.converged:
                converged += 1
                wrong += result.top.value < float(values[0]) - tol * abs(result.top.value)
                products += result.matvecs
    return wrong, converged, products


@pytest.mark.parametrize("start", ["random", "second"])
@pytest.mark.parametrize("tol", [0.1, 1e-2, 1e-4])
def test_converged_values_are_within_the_tolerance(start, tol):
    """With 1 of 200 outside, more than 3 of 70 have a probability of 1e-4."""
    wrong, converged, _ = outside(10, tol, start, 1)
    assert converged > 50
    assert wrong <= 3


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("start", ["random", "second"])
@pytest.mark.parametrize("tol", [0.1, 0.05, 0.02, 1e-2, 1e-3, 1e-4])
def test_at_most_1_in_200_converged_values_is_outside_the_tolerance(start, tol):
    wrong, converged, products = outside(200, tol, start, 2)
    mean = products / converged
    print(f"\n{start} start, tol {tol:g}: {wrong} of {converged}, {mean:.1f} products")
    assert converged > 1000
    assert wrong <= converged / 200


def test_the_random_overlap_is_exceeded_in_199_of_200_cases():
    start = torch.zeros(50, dtype=torch.float64)
    start[3] = 1
    cosines = []
    for seed in range(4000):
        vector = randomized(start, seed=seed)
        cosines.append(abs(float(vector[0] / vector.norm())))
    small = sum(cosine < random_overlap(50) for cosine in cosines)
    assert small <= 32  # 20 expected at most


def test_the_error_bound_is_the_smaller_of_two():
    assert error_bound(0.1, 2.0, 1.0) == pytest.approx(0.01)
    assert error_bound(0.1, 2.0, 1.99) == 0.1
    assert error_bound(0.1, 1.0, 2.0) == 0.1
