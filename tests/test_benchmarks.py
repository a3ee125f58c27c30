"""The benchmarks that need no quiet machine still run, on little."""

import random

from benchmarks.faults import trace
from benchmarks.schedules import false_growths, reference
from benchmarks.training import workloads
from hpc_absa import config


def test_more_estimates_make_fewer_false_growths():
    one, several = (false_growths.simulate(most, 0.3, 0.4, 150, False) for most in (1, 4))
    assert one.false > 3 * several.false
    assert one.estimates == one.decisions < several.estimates < 2 * several.decisions
    assert one.row("x", 1, False).startswith("| x | 1 | value | ")


def test_the_bound_of_a_run_prevents_false_growths():
    value, bound = (false_growths.simulate(1, 0.3, 0.4, 150, bounded) for bounded in (False, True))
    assert value.false > 20 * bound.false
    assert value.missed < bound.missed


def test_decisions_on_values_that_were_measured():
    from tests.schedules.tables import estimate

    found = [[estimate(value * factor) for factor in (0.9, 1.0, 1.1)] for value in (8, 8, 3, 3)]
    counts = false_growths.resample(found, 2, 20, True)
    assert (counts.trials, counts.false, counts.possible, counts.missed) == (20, 0, 20, 0)


def test_the_course_of_a_reference():
    course = reference.COURSES["halves in 20 epochs"]
    assert reference.true_value(course, 1) == 100
    assert abs(reference.true_value(course, 21) - 50) < 1e-9
    kept, reset = (
        reference.trial(course, 0.0, after, random.Random(0)) for after in ("keep", "reset")
    )
    assert (kept[0], reset[0]) == (1, 0), "growths by λ"


def test_what_became_of_each_sample_in_a_run_with_a_fault():
    def step(time, rank, number, *samples):
        return {"time": time, "rank": rank, "step": number, "epoch": 0, "samples": samples}

    half = len(trace.Lines()) // 2
    records = [
        {"time": 0.0},
        {"time": 0.1},
        step(1.0, 0, 1, *range(half)),
        step(1.1, 1, 1, half),
        step(2.0, 0, 2, half + 1),  # rank 1 was killed: this step is gone
        {"time": 7.0},
        step(8.0, 0, 2, half, half + 1, half + 2),
    ]
    found = trace.account(records, epochs=1)
    assert (found.steps, found.redone, found.gap) == (2, 1, 6.0)
    assert found.repeated == 1, "sample `half`, in steps 1 and 2"
    assert found.lost == half - 3


def test_jobs_of_the_throughput_benchmark():
    for model, (microbatch, _) in workloads.MODELS.items():
        job = config.parse(workloads.job(model, 4, 1, "folder", channels_last=True), model)
        assert job.schedule.base_batch == 4 * microbatch
        assert job.train.threads_per_rank == 1
