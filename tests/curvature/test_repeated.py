"""The mean of estimates on disjoint samples."""

import math

import pytest
import torch

from hpc_absa.curvature.estimate import Estimate
from hpc_absa.curvature.repeated import mean
from hpc_absa.records import Eigenvalue


def estimate(value, error=None, bound=None, converged=True, stopped=False):
    eigenvalue = Eigenvalue(
        value,
        0.01 * value,
        5,
        128,
        0.5,
        converged,
        stopped,
        sampling_error=error,
        upper_bound=bound,
    )
    return Estimate(eigenvalue, torch.full((3,), value), 0.0, 2, 1000)


def test_one_estimate_is_itself():
    only = estimate(4.0, 0.5)
    assert mean([only]) is only


def test_the_mean_and_what_it_took():
    found = mean([estimate(4.0, 0.3), estimate(4.2, 0.4)])
    value = found.eigenvalue
    assert value.value == pytest.approx(4.1)
    assert (value.matvecs, value.samples, value.seconds) == (10, 256, 1.0)
    assert value.residual == pytest.approx(0.042)
    assert (found.coarse_matvecs, found.samples_processed) == (4, 2000)
    assert torch.equal(found.vector, torch.full((3,), 4.2))


@pytest.mark.parametrize(
    ("values", "errors", "expected"),
    [
        ([4.0, 4.0], [0.3, 0.4], 0.25),  # sqrt(0.09 + 0.16)/2
        ([3.0, 5.0], [0.3, 0.4], 1.0),  # the values scatter by more: sqrt(2)/sqrt(2)
        ([3.0, 5.0], [0.3, None], 1.0),
    ],
)
def test_the_sampling_error_is_the_larger_of_stated_and_seen(values, errors, expected):
    found = mean([estimate(v, e) for v, e in zip(values, errors, strict=True)])
    assert found.eigenvalue.sampling_error == pytest.approx(expected)


def test_the_margin_of_an_upper_bound_shrinks_with_the_root_of_their_number():
    found = mean([estimate(4.0, 0.1, 4.6), estimate(4.0, 0.1, 4.8)])
    assert found.eigenvalue.upper_bound == pytest.approx(4.0 + math.hypot(0.6, 0.8) / 2)
    assert mean([estimate(4.0, bound=4.6), estimate(4.0)]).eigenvalue.upper_bound is None


def test_an_estimate_that_did_not_converge_or_stopped_early():
    assert not mean([estimate(4.0), estimate(3.0, converged=False)]).eigenvalue.converged
    stopped = mean([estimate(4.0), estimate(6.0, converged=False, stopped=True)]).eigenvalue
    assert stopped.stopped_above_threshold
    assert math.isnan(mean([estimate(4.0), estimate(math.nan)]).eigenvalue.value)
