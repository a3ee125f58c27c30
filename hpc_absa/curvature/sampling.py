"""How far λ of a sample may be from λ of all data: scatter within the sample, and a bound.

Let u be the top eigenvector of the Hessian H of all data, and H_S the Hessian of a random sample S.
Then `λ(H_S) ≥ uᵀ H_S u`, and the mean of `uᵀ H_S u` over samples is λ(H). So with its standard
error s and a quantile q of Student's t distribution, `λ(H) ≤ λ(H_S) + q s` except in the stated
share of samples. The standard error is taken from the scatter over the members of the sample, or
over groups of them, along the top eigenvector of H_S instead of u.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Cumulants:
    """Of one of the independent errors of a mean, as estimated from a sample."""

    variance: float
    third: float
    freedom: float
    """Degrees of freedom of the variance."""

    def without_replacement(self, drawn: float) -> Cumulants:
        """Of a mean over this part of a population, instead of over as many of an infinite one."""
        left = 1 - drawn
        return Cumulants(left * self.variance, left * (left - drawn) * self.third, self.freedom)


@dataclass(frozen=True)
class Scatter:
    """A mean over a sample, with its error over the choice of the sample."""

    mean: float
    errors: tuple[Cumulants, ...]

    @classmethod
    def of_groups(cls, values: Tensor, weights: Tensor) -> Scatter:
        """Of groups of samples, or of single ones, drawn at random.

        Args:
            values: [G] float64, the mean of each group.
            weights: [G] float64, their sum is 1; a group with a weight of 0 does not count.
        """
        mean, count = float(weights @ values), int((weights > 0).sum())
        return cls(mean, (_cumulants(weights * (values - mean), count),))

    @property
    def variance(self) -> float:
        """Of the mean; NaN with fewer than two groups."""
        return sum(error.variance for error in self.errors)

    @property
    def standard_error(self) -> float:
        """Of the mean; NaN with fewer than two groups."""
        return math.sqrt(self.variance)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the variance (Welch 1947)."""
        terms = [e.variance**2 / e.freedom for e in self.errors if e.variance > 0]
        if not terms:
            return sum(error.freedom for error in self.errors)
        return self.variance**2 / sum(terms)

    @property
    def skewness(self) -> float:
        """Third cumulant of the mean over its variance, 0 or more; with fewer than three groups 0.

        Where a few samples have most of the curvature, samples without them have a small mean and a
        small scatter as well.
        """
        third = sum(error.third for error in self.errors)
        return max(0.0, third / self.variance) if self.variance > 0 else 0.0

    def margin(self, level: float) -> float:
        """The true mean is above `mean + margin` with probability `level`.

        Student's t, corrected for skewness (Johnson, J. Am. Stat. Assoc. 73 (1978), equation 2.4).
        """
        q = student_t(level, self.freedom)
        return q * self.standard_error + self.skewness * (1 + 2 * q * q) / 6


def _cumulants(deviations: Tensor, count: int) -> Cumulants:
    """Of the sum of `count` terms with these deviations from their means."""
    if count < 2:
        return Cumulants(math.nan, 0.0, 0)
    variance = float((deviations**2).sum()) * count / (count - 1)
    third = float((deviations**3).sum()) if count > 2 else 0.0
    return Cumulants(variance, third * count**2 / ((count - 1) * max(1, count - 2)), count - 1)


@dataclass(frozen=True)
class Stratum:
    """Candidates with similar losses, and those of them that are in the sample."""

    start: int
    """The first one in the sample, and the one after the last."""
    stop: int
    members: int
    """Candidates."""

    @property
    def size(self) -> int:
        """Samples."""
        return self.stop - self.start


def stratified_scatter(
    values: Tensor, strata: Sequence[Stratum], candidates: int, population: float
) -> Scatter:
    """Of a stratified sample of candidates, which are a random sample themselves.

    Args:
        values: [N] float64, one a sample.
        strata: their members are all candidates.
        candidates: their number.
        population: number of samples that the candidates were drawn from without replacement.
    """
    mean, errors, squares, cubes = 0.0, [], 0.0, 0.0
    for stratum in strata:
        mean += stratum.members / candidates * float(values[stratum.start : stratum.stop].mean())
    for stratum in strata:
        own, share = values[stratum.start : stratum.stop], stratum.members / candidates
        squares += share * float(((own - mean) ** 2).mean())
        cubes += share * float(((own - mean) ** 3).mean())
        if stratum.size < stratum.members:
            of_all = _cumulants((own - own.mean()) * share / stratum.size, stratum.size)
            errors.append(of_all.without_replacement(stratum.size / stratum.members))
    first = Cumulants(squares / candidates, cubes / candidates**2, len(values) - 1)
    return Scatter(mean, (*errors, first.without_replacement(candidates / population)))


def student_t(level: float, freedom: float) -> float:
    """The quantile that Student's t exceeds with probability `level`.

    Infinite for fewer than 3 degrees of freedom: so few groups are not taken as normal.
    """
    from scipy.special import stdtrit  # not at the start of a rank: 0.2 s

    return float(stdtrit(freedom, 1 - level)) if freedom >= 3 else math.inf
