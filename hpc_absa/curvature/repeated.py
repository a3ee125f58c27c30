"""Estimates of one eigenvalue on disjoint samples, as one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from hpc_absa.curvature.estimate import Estimate


def mean(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of estimates on disjoint samples of the same size, with the last one's vector.

    Its sampling error is the larger of what the estimates state and what their values scatter. It
    has converged if all have. If the last one stopped early, the mean is above the threshold.
    """
    last, k = estimates[-1], len(estimates)
    if k == 1:
        return last
    parts = [estimate.eigenvalue for estimate in estimates]
    values = [part.value for part in parts]
    value = statistics.fmean(values)
    scatter = statistics.stdev(values) / math.sqrt(k) if all(map(math.isfinite, values)) else None
    errors = [part.sampling_error for part in parts if part.sampling_error is not None]
    stated = math.hypot(*errors) / k if len(errors) == k else None
    accuracies = [part.error for part in parts if part.error is not None]
    margins = [part.upper_bound - part.value for part in parts if part.upper_bound is not None]
    eigenvalue = replace(
        last.eigenvalue,
        value=value,
        residual=max(part.residual for part in parts),
        matvecs=sum(part.matvecs for part in parts),
        samples=sum(part.samples for part in parts),
        seconds=sum(part.seconds for part in parts),
        converged=all(part.converged for part in parts),
        error=max(accuracies, default=None),
        sampling_error=max((e for e in (scatter, stated) if e is not None), default=None),
        upper_bound=value + math.hypot(*margins) / k if len(margins) == k else None,
    )
    return replace(
        last,
        eigenvalue=eigenvalue,
        coarse_matvecs=sum(estimate.coarse_matvecs for estimate in estimates),
        samples_processed=sum(estimate.samples_processed for estimate in estimates),
    )
