"""The integer program and the Pareto front, against published allocations and all allocations."""

import itertools
import json

import numpy as np
import pytest

from hpc_absa.errors import UsageError
from hpc_absa.quantization.allocation import (
    Limit,
    Problem,
    pareto_front,
    parse_limit,
    random_choices,
    read_latencies,
    solve,
)
from tests import shared_data

COSTS = {"modelsize": "size", "bops": "bops", "latency": "latency"}
BEATEN = ("resnet50", "modelsize 0.25")
"""The published allocation is below the optimum."""


def published(network):
    data = json.loads(shared_data.require("hawq/allocations.json").read_text())[network]
    traces = np.array(data["trace_over_parameters"])
    errors = np.array([data["squared_error_4bit"], data["squared_error_8bit"]]).T
    bits = np.array([4.0, 8.0])
    costs = {
        "size": np.outer(data["parameters_million"], bits / 8),
        "bops": np.outer(data["bops_32bit_million"], bits**2 / 32**2),
        "latency": np.array([data["latency_ms_4bit"], data["latency_ms_8bit"]]).T,
    }
    names = tuple(f"layer{i}" for i in range(len(traces)))
    groups = tuple(map(tuple, data["layers_of_equal_bits"]))
    return Problem(names, (4, 8), traces[:, None] * errors, costs, groups), data["published"]


@pytest.mark.parametrize("network", ["resnet18", "resnet50"])
def test_published_allocations(network):
    problem, answers = published(network)
    assert len(answers) == 9
    for key, answer in answers.items():
        cost, share = key.split()
        limit = Limit(COSTS[cost], float(share), relative=True)
        found = solve(problem, [limit])
        theirs = [problem.bits.index(bits) for bits in answer]
        assert problem.total(limit.cost, found) <= limit.absolute(problem) * (1 + 1e-9)
        if (network, key) == BEATEN:
            low = problem.omega([1] * len(found))
            gains = [problem.omega([0] * len(found)) - problem.omega(c) for c in (found, theirs)]
            assert low < problem.omega(found) < problem.omega(theirs)
            assert gains == pytest.approx([0.8314, 0.8232], abs=5e-4)
        else:
            assert found == theirs, key


def small(seed, groups=()):
    random = np.random.default_rng(seed)
    layers, bits = 6, (2, 4, 8)
    sensitivity = np.sort(random.random((layers, 3)))[:, ::-1].copy()
    costs = {
        "size": random.integers(1, 9, (layers, 1)) * np.array([[2.0, 4.0, 8.0]]),
        "bops": random.random((layers, 1)) * np.array([[4.0, 16.0, 64.0]]),
    }
    return Problem(tuple("abcdef"), bits, sensitivity, costs, groups)


def every_choice(problem):
    for choice in itertools.product(range(3), repeat=6):
        if all(len({choice[layer] for layer in group}) == 1 for group in problem.groups):
            yield list(choice)


@pytest.mark.parametrize("groups", [(), ((0, 3), (2, 4, 5))])
@pytest.mark.parametrize("seed", range(3))
def test_the_program_is_the_best_of_all(seed, groups):
    problem = small(seed, groups)
    limits = [Limit("size", 0.4, relative=True), Limit("bops", 0.5, relative=True)]
    most = [limit.absolute(problem) for limit in limits]
    allowed = [
        choice
        for choice in every_choice(problem)
        if all(problem.total(x.cost, choice) <= m for x, m in zip(limits, most, strict=True))
    ]
    best = min(map(problem.omega, allowed))
    assert problem.omega(solve(problem, limits)) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("groups", [(), ((0, 3), (2, 4, 5))])
def test_the_front_has_every_allocation_that_no_other_beats(groups):
    problem = small(1, groups)
    points = {(problem.total("size", c), problem.omega(c)) for c in every_choice(problem)}
    expected = sorted(
        (cost, omega)
        for cost, omega in points
        if not any(c <= cost and o <= omega and (c, o) != (cost, omega) for c, o in points)
    )
    front = pareto_front(problem, "size")
    assert front.exact
    np.testing.assert_allclose(np.array([front.costs, front.omegas]).T, expected)
    for cost, choice in zip(front.costs, front.choices, strict=True):
        assert problem.total("size", list(choice)) == pytest.approx(cost)
    thin = pareto_front(problem, "size", points=5)
    assert not thin.exact
    assert thin.costs[0] == front.costs[0]
    assert thin.omegas[-1] == pytest.approx(front.omegas[-1])


def test_random_allocations_use_the_same_size():
    problem = small(2)
    limit = Limit("size", 0.5, relative=True)
    found = random_choices(problem, limit, 20)
    totals = [problem.total("size", choice) for choice in found]
    assert len(found) == 20
    assert max(totals) <= limit.absolute(problem)
    assert min(totals) > 0.8 * limit.absolute(problem)


def test_limits():
    assert parse_limit("size", "0.25") == Limit("size", 0.25, relative=True)
    assert parse_limit("size", "1.5MB") == Limit("size", 1.5e6, relative=False)
    assert parse_limit("bops", "3 G") == Limit("bops", 3e9, relative=False)
    assert parse_limit("latency", "12ms") == Limit("latency", 12.0, relative=False)
    for text in ("1.5", "-1", "many", "3 parsecs", ""):
        with pytest.raises(UsageError, match="--size"):
            parse_limit("size", text)


def test_an_impossible_limit_is_one_line():
    problem = small(0)
    low = problem.bounds("size")[0]
    with pytest.raises(UsageError, match=f"size limit 1: impossible, expected at least {low:g}"):
        solve(problem, [parse_limit("size", "1e-6MB")])
    with pytest.raises(UsageError, match="impossible"):
        solve(problem, [Limit("size", float("nan"), relative=True)])
    slow = np.array([[8.0, 4.0, 2.0]] * 6)  # the fewest bits take the longest
    both = Problem(problem.names, problem.bits, problem.sensitivity,
                   {"size": problem.costs["size"], "latency": slow})  # fmt: skip
    assert solve(both, [Limit("latency", 12.0, relative=False)]) == [2] * 6
    with pytest.raises(UsageError, match=r"no allocation meets all limits together \(size ≤"):
        solve(both, [Limit("size", 0.0, relative=True), Limit("latency", 12.0, relative=False)])


def test_latency_tables(tmp_path):
    path = tmp_path / "latency.csv"
    path.write_text("layer,4,8\nb,0.1,0.2\na,0.3,0.4\n")
    assert read_latencies(path, ["a", "b"], (4, 8)).tolist() == [[0.3, 0.4], [0.1, 0.2]]
    for names, match in ((["a"], "2 layers, expected the 1 of the model"), (["a", "c"], "b, c")):
        with pytest.raises(UsageError, match=match):
            read_latencies(path, names, (4, 8))
    with pytest.raises(UsageError, match="first row 'layer,4,8', expected 'layer,2,4'"):
        read_latencies(path, ["a", "b"], (2, 4))
    for row in ("a,0.1", "a,0.1,soon", "a,0.1,-1", "a,0.1,nan"):
        path.write_text(f"layer,4,8\n{row}\n")
        with pytest.raises(UsageError, match="expected 2 latencies in ms"):
            read_latencies(path, ["a"], (4, 8))
    with pytest.raises(UsageError, match="cannot be read"):
        read_latencies(tmp_path / "none.csv", ["a"], (4, 8))


def test_sensitivities_that_are_no_numbers_are_refused():
    problem = small(0)
    problem.sensitivity[2, 1] = np.nan
    with pytest.raises(UsageError, match="layer c: its sensitivity"):
        solve(problem, [Limit("size", 0.5, relative=True)])
