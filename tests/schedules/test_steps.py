"""The explicit list of batches."""

import pytest

from hpc_absa import config
from hpc_absa.errors import UsageError
from hpc_absa.plan import plan
from hpc_absa.schedules import Steps
from tests.schedules.tables import actions, at, batches, bound, follow, lrs

JOB = """
name = "a"
data = { name = "digits" }
model = { name = "m" }
train = { epochs = 10, microbatch = 32, lr = 0.1 }
[schedule]
method = "steps"
base_batch = 32
"""


def rule(text, samples=1000, base=32, milestones=(), **keys):
    train = bound(Steps(base_batch=base), microbatch=32, milestones=milestones)._train
    return Steps(base_batch=base, batches=text, **keys).bind(train, samples=samples)


def epochs(count, step=1.0):
    return [at(step * k) for k in range(1, count + 1)]


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("", [32, 32, 32, 32]),
        ("0:32 2e:64", [32, 64, 64, 64]),
        ("2K:64 3.5K:128", [32, 64, 64, 128]),
        ("2000:64 2001:128", [32, 64, 128, 128]),
        ("1e:64 1.5e:96 4e:256", [64, 96, 96, 256]),
        ("0.001M:64 0.000003B:128", [64, 64, 128, 128]),
    ],
)
def test_a_batch_applies_from_the_first_boundary_at_its_threshold(text, sizes):
    assert batches(follow(rule(text), epochs(4))) == sizes


def test_a_threshold_with_a_decimal_point_is_exact():
    assert batches(follow(rule("16.1K:64", samples=16100), epochs(1))) == [64]


def test_boundaries_that_are_no_decision_points_count():
    seen = [at(1, decision_point=False), at(2, decision_point=False)]
    assert actions(follow(rule("2e:64"), seen)) == "cg"


def test_entries_above_the_maximum_are_cut_to_it():
    limited = rule("1e:64 2e:128 3e:256", max_batch=96)
    assert batches(follow(limited, epochs(4))) == [64, 96, 96, 96]
    assert limited.largest_batch == 96
    assert rule("1e:64 2e:128").largest_batch == 128


@pytest.mark.parametrize(
    ("lr_rule", "factor"), [("none", 1), ("square-root", 2**0.5), ("linear", 2)]
)
def test_the_learning_rate_follows_by_lr_rule_and_decays_at_milestones(lr_rule, factor):
    decisions = follow(rule("1e:64", lr_rule=lr_rule, milestones=(1,)), epochs(1))
    assert lrs(decisions) == pytest.approx([0.01 * factor])
    assert decisions[0].reason == (
        "batch 64 from epoch 1: batch 32 → 64; milestone at epoch 1: learning rate 0.1 → 0.01"
    )


def test_the_plan_is_exact():
    job = config.parse(JOB, "test", ('schedule.batches="3200:64 8e:128"',))
    (planned,) = plan(job, 640, 8).values()
    assert [(p.global_batch, round(p.epochs)) for p in planned.phases] == [
        (32, 5),
        (64, 3),
        (128, 2),
    ]


def test_a_run_until_the_time_limit_is_planned_in_a_moment():
    job = config.parse(JOB, "test", ('schedule.batches="640K:64 900000e:128"', "train.epochs=1e6"))
    (planned,) = plan(job, 640, 8).values()
    assert [round(p.epochs) for p in planned.phases] == [1000, 899_000, 100_000]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("64", "schedule.batches: '64': expected FROM:BATCH, such as 0:64, 1.5M:128 or 30e:256"),
        ("1k:64", "'1k:64': expected FROM:BATCH"),
        ("1e:64 2e:64", "64 and then 64: expected increasing batches"),
        ("1e:65", "schedule.batches: 65: expected a multiple of train.microbatch = 32"),
        ("0:64", "schedule.batches: 64: expected schedule.base_batch = 32 at the start"),
    ],
)
def test_a_wrong_list_is_one_line(text, line):
    with pytest.raises(UsageError) as caught:
        config.parse(JOB, "test", (f'schedule.batches="{text}"',))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_thresholds_that_do_not_increase_once_they_are_compared():
    job = config.parse(JOB, "test", ('schedule.batches="3e:64 640:128"',))
    with pytest.raises(UsageError, match="expected increasing thresholds"):
        plan(job, 640, 8)


def test_samples_need_the_size_of_the_training_set():
    job = config.parse(JOB, "test", ('schedule.batches="10K:64"',))
    rule = job.schedule.bind(job.train)
    assert rule.initial().global_batch == 32  # all that starting a run needs
    with pytest.raises(UsageError, match="the number of training samples is not known here"):
        rule.decide(rule.initial(), at(1))
