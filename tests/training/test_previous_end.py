"""Which event a launch measures its start from."""

import pytest

from hpc_absa.rundir import RunDir
from hpc_absa.training.resume import previous_end

RESIZE, STOPPED = {"outcome": "resize", "ranks": 1}, {"outcome": "stopped", "ranks": 1}


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], None),
        ([("phase_end", RESIZE)], "phase_end"),
        ([("phase_end", RESIZE), ("phase_start", {})], "phase_end"),
        ([("phase_end", RESIZE), ("resize", {})], None),
        ([("phase_end", STOPPED)], None),
        ([("phase_end", RESIZE), ("resize", {}), ("failure", {})], "failure"),
        ([("failure", {}), ("restart", {}), ("progress", {})], None),
        ([("failure", {}), ("failure", {})], "failure"),
    ],
)
def test_the_end_of_the_launch_before(tmp_path, events, expected):
    run = RunDir(tmp_path)
    for kind, fields in events:
        run.log.append(kind, 1, **fields)
    found = previous_end(run)
    assert (found and found["event"]) == expected
