"""The damage campaign: whatever is done to the files, nothing wrong is loaded as good.

`HPC_ABSA_SOAK_DAMAGES` (1200) cases drawn from `HPC_ABSA_SOAK_SEED` (0), in processes of their own:
a crash or a hang inside a library names its case.
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
"""Seconds that a case may take; thousands of times what it takes."""


def outcomes(folder: Path, seed: str, first: int, last: int) -> list[dict[str, object]]:
    """What came of each case; a crash or a hang is one, and the rest go on behind it."""
    found: list[dict[str, object]] = []
    while first < last:
        words = [sys.executable, "-m", "tests.soak.damage", str(folder / str(first)), seed]
        words += [str(first), str(last)]
        with subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
        ) as child:
            try:
                output, errors = child.communicate(timeout=SLOWEST + 0.5 * (last - first))
            except subprocess.TimeoutExpired:
                child.kill()
                output, errors = child.communicate()
        lines = [json.loads(line) for line in output.splitlines()]
        assert lines, errors
        found += [line for line in lines if "outcome" in line]
        if "outcome" in lines[-1]:
            assert child.returncode == 0, errors
            return found
        ending = f"WRONG: ended the process ({child.returncode}): {errors.strip()[-300:]}"
        found.append({**lines[-1], "outcome": ending})
        first = int(lines[-1]["number"]) + 1
    return found


def report(found: list[dict[str, object]], campaign: Summary) -> list[dict[str, object]]:
    """Count the cases; returns those that broke a rule."""
    wrong = [case for case in found if str(case["outcome"]).startswith("WRONG")]
    for case in found:
        outcome = str(case["outcome"]) if case in wrong else "passed"
        campaign.add(Case("damage", str(case["way"]), outcome=outcome))
    return wrong


def test_nothing_wrong_is_loaded(tmp_path: Path, campaign: Summary):
    """Each way once."""
    found = outcomes(tmp_path, "short", 0, len(FILE_WAYS))
    assert report(found, campaign) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_nothing_wrong_is_loaded_in_a_thousand_cases(tmp_path: Path, campaign: Summary):
    found = outcomes(tmp_path, SEED, 0, DAMAGES)
    assert report(found, campaign) == []
    assert len(found) == DAMAGES
    spread = Counter(str(case["outcome"]) for case in found)
    # Not a campaign that damages nothing: what is harmless is rare.
    assert spread["still good"] < DAMAGES // 10
    assert spread["an older one"] > DAMAGES // 3
    assert spread["clear error"] > DAMAGES // 20
