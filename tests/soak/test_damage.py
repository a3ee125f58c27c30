"""The damage campaign: no damaged checkpoint is loaded as a good one.

`HPC_ABSA_SOAK_DAMAGES` (1200) random cases of the seed `HPC_ABSA_SOAK_SEED` (0), in a separate
process, so that a crash or hang inside a library is reported with its case.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.soak.damage import FILE_WAYS
from tests.soak.runs import ROOT
from tests.soak.summary import Case, Summary

DAMAGES = int(os.environ.get("HPC_ABSA_SOAK_DAMAGES", "1200"))
SEED = os.environ.get("HPC_ABSA_SOAK_SEED", "0")
SLOWEST = 60.0
"""Seconds after which a case counts as hung."""


def outcomes(folder: Path, seed: str, first: int, last: int) -> list[dict[str, object]]:
    """The outcome of each case; after a crash or a hang, a new process runs the rest."""
    cases: list[dict[str, object]] = []
    while first < last:
        command = [sys.executable, "-m", "tests.soak.damage", str(folder / str(first)), seed]
        command += [str(first), str(last)]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as child:
            try:
                output, errors = child.communicate(timeout=SLOWEST + 0.5 * (last - first))
            except subprocess.TimeoutExpired:
                child.kill()
                output, errors = child.communicate()
        lines = [json.loads(line) for line in output.splitlines()]
        assert lines, errors
        cases += [line for line in lines if "outcome" in line]
        if "outcome" in lines[-1]:
            assert child.returncode == 0, errors
            return cases
        ending = f"WRONG: ended the process ({child.returncode}): {errors.strip()[-300:]}"
        cases.append({**lines[-1], "outcome": ending})
        first = int(lines[-1]["number"]) + 1
    return cases


def record(cases: list[dict[str, object]], campaign: Summary) -> list[dict[str, object]]:
    """Count the cases; returns those that broke a rule."""
    wrong = [case for case in cases if str(case["outcome"]).startswith("WRONG")]
    for case in cases:
        outcome = str(case["outcome"]) if case in wrong else "passed"
        campaign.add(Case("damage", str(case["way"]), outcome=outcome))
    return wrong


def test_nothing_wrong_is_loaded_with_each_kind_of_damage(tmp_path: Path, campaign: Summary):
    cases = outcomes(tmp_path, "short", 0, len(FILE_WAYS))
    assert record(cases, campaign) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_wrong_is_loaded_in_a_thousand_cases(tmp_path: Path, campaign: Summary):
    cases = outcomes(tmp_path, SEED, 0, DAMAGES)
    assert record(cases, campaign) == []
    assert len(cases) == DAMAGES
    counts = Counter(str(case["outcome"]) for case in cases)
    # The campaign does damage the files: harmless changes are rare.
    assert counts["still good"] < DAMAGES // 10
    assert counts["an older one"] > DAMAGES // 3
    assert counts["clear error"] > DAMAGES // 20
