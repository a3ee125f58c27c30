"""The bits of each layer: the Pareto front and the integer program of HAWQ.

Shapes:
    L  layers
    K  choices of bits
    G  groups of layers with equal bits
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_absa.errors import UsageError

Floats = NDArray[np.float64]

FRONT_POINTS = 20_000
"""Of the front while it is built: beyond, the best in each of so many intervals of the cost."""


@dataclass(frozen=True)
class Problem:
    """Which bits the layers can have, and what that costs."""

    names: tuple[str, ...]
    """[L], layers."""
    bits: tuple[int, ...]
    """[K], ascending."""
    sensitivity: Floats
    """[L, K], Ω."""
    costs: Mapping[str, Floats]
    """[L, K] each: `size` in bytes, `bops`, `latency` in ms, ..."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Layers that have equal bits; each layer is in one group at most."""

    def bounds(self, cost: str) -> tuple[float, float]:
        """The cost with the fewest and with the most bits everywhere."""
        table = self.costs[cost]
        return float(table[:, 0].sum()), float(table[:, -1].sum())

    def total(self, cost: str, choice: Sequence[int]) -> float:
        return float(self.costs[cost][np.arange(len(choice)), list(choice)].sum())

    def omega(self, choice: Sequence[int]) -> float:
        """ΣΩ."""
        return float(self.sensitivity[np.arange(len(choice)), list(choice)].sum())

    def merged(self) -> list[list[int]]:
        """[G], the layers of each group, in the order of the first of them."""
        grouped = {layer for group in self.groups for layer in group}
        single = [[layer] for layer in range(len(self.names)) if layer not in grouped]
        return sorted([*single, *(sorted(group) for group in self.groups if group)])


@dataclass(frozen=True)
class Limit:
    """An upper limit of one cost: a share of its range, or a value."""

    cost: str
    value: float
    relative: bool
    """`value` is f in `cost(fewest bits) + f (cost(most bits) − cost(fewest bits))`."""

    def absolute(self, problem: Problem) -> float:
        """The limit in the units of the cost.

        Raises:
            UsageError: no allocation meets it.
        """
        low, high = problem.bounds(self.cost)
        limit = low + self.value * (high - low) if self.relative else self.value
        least = float(_summed(problem.costs[self.cost], problem.merged()).min(1).sum())
        if not limit >= least * (1 - 1e-12):
            raise UsageError(
                f"{self.cost} limit {limit:.6g}: impossible, expected at least {least:.6g} (the "
                f"layers that can choose cost {low:.6g} with {problem.bits[0]} bits each, "
                f"{high:.6g} with {problem.bits[-1]})"
            )
        return limit


UNITS: Mapping[str, Mapping[str, float]] = {
    "size": {"KB": 1e3, "MB": 1e6, "KiB": 2.0**10, "MiB": 2.0**20},
    "bops": {"K": 1e3, "M": 1e6, "G": 1e9},
    "latency": {"us": 1e-3, "ms": 1.0, "s": 1e3},
}
"""Units of an absolute limit; the costs themselves are in bytes, operations and ms."""


def parse_limit(cost: str, text: str) -> Limit:
    """`0.5` is a share of the range of the cost, `1.2MB`, `3G` and `12ms` are values.

    Raises:
        UsageError: another form, or a share outside 0 to 1.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:[eE][-+]?\d+)?)\s*([A-Za-z]*)\s*", text)
    units = UNITS[cost]
    try:
        assert match
        value, unit = float(match[1]), match[2]
        factor = units[unit] if unit else 1.0
    except (AssertionError, ValueError, KeyError):
        raise UsageError(
            f"--{cost} {text!r}: expected a share from 0 to 1, or a number with one of the units "
            f"{', '.join(units)}"
        ) from None
    if not unit and value > 1:
        raise UsageError(
            f"--{cost} {text!r}: expected a share from 0 (fewest bits) to 1 (most bits), or a "
            f"number with one of the units {', '.join(units)}"
        )
    return Limit(cost, value * factor, relative=not unit)


def solve(problem: Problem, limits: Sequence[Limit]) -> list[int]:
    """[L], the choices that minimise ΣΩ under all limits: HAWQ-V3's integer linear program.

    Raises:
        UsageError: no allocation meets the limits, or a sensitivity is not finite.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    _require_finite(problem)
    absolute = {limit: limit.absolute(problem) for limit in limits}
    groups, choices = problem.merged(), len(problem.bits)
    omega = _summed(problem.sensitivity, groups)
    one_each = np.kron(np.eye(len(groups)), np.ones(choices))
    constraints = [LinearConstraint(one_each, 1, 1)]
    for limit, value in absolute.items():
        costs = _summed(problem.costs[limit.cost], groups).ravel()
        scale = float(costs.max(initial=0.0)) or 1.0
        constraints.append(LinearConstraint(costs / scale, -np.inf, value / scale * (1 + 1e-12)))
    # the solver's tolerances are absolute
    objective = omega.ravel() / (float(np.abs(omega).max(initial=0.0)) or 1.0)
    result = milp(
        objective, constraints=constraints, integrality=1, bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    if result.x is None:
        listed = ", ".join(f"{limit.cost} ≤ {value:.6g}" for limit, value in absolute.items())
        raise UsageError(f"no allocation meets all limits together ({listed}); raise one of them")
    chosen = result.x.reshape(len(groups), choices).argmax(1)
    return _spread(chosen, groups, len(problem.names))


@dataclass(frozen=True)
class Front:
    """The allocations that no other beats in both cost and ΣΩ, from the cheapest (HAWQ-V2)."""

    costs: Floats
    """[n], ascending."""
    omegas: Floats
    """[n], descending."""
    choices: NDArray[np.int64]
    """[n, L]."""
    exact: bool
    """Whether no point was left out while the front was built (`FRONT_POINTS`)."""


def pareto_front(problem: Problem, cost: str, points: int = FRONT_POINTS) -> Front:
    """Adds one group after the other to the front of those before it, without dominated points."""
    _require_finite(problem)
    groups = problem.merged()
    omega, price = _summed(problem.sensitivity, groups), _summed(problem.costs[cost], groups)
    costs, omegas = np.zeros(1), np.zeros(1)
    steps: list[tuple[NDArray[Any], NDArray[Any]]] = []
    exact = True
    for row in range(len(groups)):
        costs = (costs[:, None] + price[row]).ravel()
        omegas = (omegas[:, None] + omega[row]).ravel()
        kept = _undominated(costs, omegas)
        if len(kept) > points:
            exact = False
            kept = _thinned(kept, costs, points)
        steps.append(np.divmod(kept, len(problem.bits)))
        costs, omegas = costs[kept], omegas[kept]
    index = np.arange(len(costs))
    table = np.zeros((len(costs), len(groups)), np.int64)
    for row in reversed(range(len(groups))):
        before, choice = steps[row]
        table[:, row] = choice[index]
        index = before[index]
    spread = [_spread(chosen, groups, len(problem.names)) for chosen in table]
    return Front(costs, omegas, np.array(spread, np.int64), exact)


def _undominated(costs: Floats, omegas: Floats) -> NDArray[np.int64]:
    """Indices, by ascending cost and strictly falling ω."""
    order = np.lexsort((omegas, costs))
    least = np.minimum.accumulate(omegas[order])
    first = np.concatenate([[True], least[1:] < least[:-1]])
    return order[first]


def _thinned(kept: NDArray[np.int64], costs: Floats, points: int) -> NDArray[np.int64]:
    """The last point, which has the least ω, in each of `points` equal intervals of the cost."""
    values = costs[kept]
    extent = float(values[-1] - values[0]) or 1.0
    interval = np.floor((values - values[0]) / extent * points)
    last = np.append(interval[1:] != interval[:-1], True)
    last[0] = True  # the cheapest
    return kept[last]


def random_choices(problem: Problem, limit: Limit, count: int, seed: int = 0) -> list[list[int]]:
    """Random allocations within the limit that use nearly all of it, to compare with.

    Groups in random order take random bits; then groups in random order take the most bits that
    the limit still allows.
    """
    most = limit.absolute(problem)
    generator = np.random.default_rng(seed)
    groups = problem.merged()
    costs = _summed(problem.costs[limit.cost], groups)
    found: list[list[int]] = []
    for _ in range(count):
        chosen = generator.integers(0, len(problem.bits), len(groups))
        total = float(costs[np.arange(len(groups)), chosen].sum())
        for group in generator.permutation(len(groups)):
            if total > most:  # fewer bits until it fits
                total -= costs[group, chosen[group]] - costs[group, 0]
                chosen[group] = 0
        for group in generator.permutation(len(groups)):
            for choice in range(len(problem.bits) - 1, chosen[group], -1):
                more = costs[group, choice] - costs[group, chosen[group]]
                if total + more <= most * (1 + 1e-12):
                    total += more
                    chosen[group] = choice
                    break
        found.append(_spread(chosen, groups, len(problem.names)))
    return found


def _summed(table: Floats, groups: Sequence[Sequence[int]]) -> Floats:
    return np.array([table[list(group)].sum(0) for group in groups])


def _spread(chosen: Sequence[int] | NDArray[Any], groups: Any, layers: int) -> list[int]:
    result = [0] * layers
    for choice, group in zip(chosen, groups, strict=True):
        for layer in group:
            result[layer] = int(choice)
    return result


def _require_finite(problem: Problem) -> None:
    for name, row in zip(problem.names, problem.sensitivity, strict=True):
        if not np.isfinite(row).all():
            raise UsageError(f"layer {name}: its sensitivity is {row.tolist()}, expected numbers")


def read_latencies(path: Any, names: Sequence[str], bits: Sequence[int]) -> Floats:
    """[L, K] in ms, from a table of comma-separated values.

    The first row is `layer` and the numbers of bits, then one row per layer:

        layer,4,8
        conv1,0.21,0.36

    Raises:
        UsageError: it cannot be read, or its layers or bits are not those of the model.
    """
    import csv

    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from None
    header = ["layer", *(str(b) for b in bits)]
    if not rows or [cell.strip() for cell in rows[0]] != header:
        found = ",".join(rows[0]) if rows else "nothing"
        raise UsageError(f"{path}: first row {found!r}, expected {','.join(header)!r}")
    given = {row[0].strip(): row[1:] for row in rows[1:]}
    if len(rows) - 1 != len(names) or given.keys() != set(names):
        other = sorted(given.keys() ^ set(names))
        raise UsageError(
            f"{path}: {len(rows) - 1} layers, expected the {len(names)} of the model, one row "
            f"each (not in both: {', '.join(other[:4]) or 'none, but some twice'})"
        )
    table = np.zeros((len(names), len(bits)))
    for index, name in enumerate(names):
        try:
            row = [float(cell) for cell in given[name]]
        except ValueError:
            row = []
        table[index] = row if len(row) == len(bits) else math.nan
        if not (np.isfinite(table[index]).all() and (table[index] >= 0).all()):
            values = ",".join(given[name])
            raise UsageError(f"{path}: {name},{values}: expected {len(bits)} latencies in ms")
    return table
