"""How far λ of a sample may be from λ of all data: scatter within the sample, and a bound.

Let u be the top eigenvector of the Hessian H of all data, and H_S the Hessian of a random sample S.
Then `λ(H_S) ≥ uᵀ H_S u`, and the mean of `uᵀ H_S u` over samples is λ(H). So with its standard
error s and a quantile q of Student's t distribution, `λ(H) ≤ λ(H_S) + q s` except in the stated
share of samples. The standard error is taken from the scatter over the members of the sample, or
over groups of them, along the top eigenvector of H_S instead of u.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Scatter:
    """A mean over groups of samples."""

    values: Tensor
    """[G] float64, one a group."""
    weights: Tensor
    """[G] float64, their sum is 1."""

    @property
    def groups(self) -> int:
        """Groups that have a weight."""
        return int((self.weights > 0).sum())

    @property
    def mean(self) -> float:
        """The weighted mean."""
        return float(self.weights @ self.values)

    @property
    def standard_error(self) -> float:
        """Of the mean; NaN with fewer than two groups."""
        count = self.groups
        if count < 2:
            return math.nan
        deviations = self.values - self.weights @ self.values
        return float(((self.weights * deviations) ** 2).sum().mul(count / (count - 1)).sqrt())

    @property
    def skewness(self) -> float:
        """Third cumulant of the mean over its variance, 0 or more; with fewer than three groups 0.

        Where a few samples have most of the curvature, samples without them have a small mean and a
        small scatter as well.
        """
        count = self.groups
        if count < 3:
            return 0.0
        deviations = self.weights * (self.values - self.weights @ self.values)
        variance, third = (deviations**2).sum(), (deviations**3).sum()
        return max(0.0, float(third / variance * count / (count - 2))) if variance > 0 else 0.0

    def margin(self, level: float) -> float:
        """The true mean is above `mean + margin` with probability `level`.

        Student's t, corrected for skewness (Johnson, J. Am. Stat. Assoc. 73 (1978), equation 2.4).
        """
        q = student_t(level, self.groups - 1)
        return q * self.standard_error + self.skewness * (1 + 2 * q * q) / 6


def student_t(level: float, freedom: int) -> float:
    """The quantile that Student's t exceeds with probability `level`.

    Infinite for fewer than 3 degrees of freedom: so few groups are not taken as normal.
    """
    from scipy.special import stdtrit  # not at the start of a rank: 0.2 s

    return float(stdtrit(freedom, 1 - level)) if freedom >= 3 else math.inf
