"""The campaigns' bookkeeping: what it detects."""

import json
from collections import Counter

import pytest

from tests.soak import ledger, watched
from tests.soak.summary import Case, Summary


@pytest.fixture(name="folder")
def _folder(tmp_path):
    return tmp_path


def rank(folder, launch, number, *lines):
    """Lines (time, step, visits) of one rank."""
    path = folder / f"launch-{launch}-rank-{number}.jsonl"
    text = [
        json.dumps({"kind": "step", "time": time, "step": step, "visits": visits})
        for time, step, visits in lines
    ]
    path.write_text("\n".join(text) + "\n")


def committed(folder):
    return ledger.committed(ledger.launches(folder))


def test_steps_are_the_sum_of_their_ranks(folder):
    rank(folder, "a", 0, (1, 1, [[0, 7]]), (2, 2, [[0, 9]]))
    rank(folder, "a", 1, (1, 1, [[0, 8]]))
    assert committed(folder) == {1: Counter([(0, 7), (0, 8)]), 2: Counter([(0, 9)])}


def test_a_later_launch_replaces_the_steps_from_its_first_one_on(folder):
    rank(folder, "a", 0, (1, 1, [[0, 7]]), (2, 2, [[0, 8]]), (3, 3, [[0, 9]]))
    rank(folder, "b", 0, (5, 2, [[0, 8]]))
    assert committed(folder) == {1: Counter([(0, 7)]), 2: Counter([(0, 8)])}


def test_a_sample_that_is_repeated_or_missing_is_detected(folder):
    rank(folder, "a", 0, (1, 1, [[0, 7]]), (2, 2, [[0, 8]]))
    wanted = committed(folder)
    rank(folder, "b", 0, (3, 2, [[0, 8]]))
    rank(folder, "b", 1, (3, 2, [[0, 8]]))
    assert committed(folder) != wanted
    rank(folder, "b", 1, (3, 2, []))
    assert committed(folder) == wanted
    rank(folder, "c", 0, (4, 4, [[0, 9]]))
    assert committed(folder) != wanted


def test_two_launches_at_the_same_time_are_detected(folder):
    rank(folder, "a", 0, (1, 1, []), (4, 2, []))
    rank(folder, "b", 0, (5, 2, []))
    assert ledger.overlapping(ledger.launches(folder)) == []
    rank(folder, "a", 1, (6, 2, []))
    assert ledger.overlapping(ledger.launches(folder)) == [("launch-a", "launch-b")]


def test_the_next_step_is_one_of_a_later_launch(folder):
    rank(folder, "a", 0, (1, 1, []), (4, 2, []))
    rank(folder, "b", 0, (5, 2, []), (6, 3, []))
    launches = ledger.launches(folder)
    assert ledger.next_step(launches, 2) == 5
    assert ledger.next_step(launches, 7) is None


def test_the_table_has_medians_and_failures():
    summary = Summary()
    for seconds in (1.0, 2.0, 30.0, None):
        summary.add(Case("kill", "rank", seconds))
    summary.add(Case("signal", "SIGTERM", outcome="exit 1"))
    kill, _, signal, wrong = summary.table()
    assert kill == "kill: 4 cases; to the next step: median 2.0 s, 95 % 30.0 s"
    assert signal == "signal: 1 cases"
    assert wrong.endswith("SIGTERM  exit 1")


def test_every_function_that_begins_a_moment_of_the_campaigns_exists():
    for module, name, moment in watched.ANNOUNCED:
        assert callable(getattr(module, name)), moment
