"""The batch that the next world is launched for, before and after the first event."""

import pytest

from hpc_absa.rundir import RunDir
from hpc_absa.supervisor.driver import present_batch
from tests.supervisor.digits import digits

OWN = "{method='tests.schedules.test_own:Faulty', base_batch=32, max_batch=128, start=96}"


@pytest.mark.parametrize(
    ("schedule", "batch"),
    [
        ("{method='bl', base_batch=32, max_batch=128}", 128),
        ("{method='fb', base_batch=32, max_batch=128}", 128),
        ("{method='absa', base_batch=32, max_batch=128}", 32),
        (OWN, 96),
    ],
)
def test_a_run_begins_with_its_rule_s_batch_and_goes_on_with_its_events(tmp_path, schedule, batch):
    job, run = digits(f"schedule={schedule}"), RunDir(tmp_path).create()
    assert present_batch(job, run) == batch
    run.log.append("phase_start", 1, global_batch=64)
    assert present_batch(job, run) == 64
    run.log.append("decision", 1, batch=64, next_batch=128)
    assert present_batch(job, run) == 128
