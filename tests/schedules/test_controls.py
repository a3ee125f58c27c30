"""Controls: patience alone, λ alone, random growth; and what made the batch grow."""

import math
import statistics

import pytest

from hpc_absa import config
from hpc_absa.errors import UsageError
from hpc_absa.plan import plan
from hpc_absa.records import Decision, ScheduleState
from hpc_absa.schedules import ABS, ABSA, GG, GNS, NormTest, RandomGrowth, Rule, Seesaw, Steps
from hpc_absa.schedules.controls import RandomState
from tests.schedules.tables import actions, at, batches, bound, follow
from tests.schedules.test_noise import step

NEVER = 10**6


def epochs(*eigenvalues):
    return [at(epoch, value) for epoch, value in enumerate(eigenvalues, start=1)]


# Patience alone and λ alone


def test_patience_alone_grows_every_kappa_decisions_and_estimates_nothing():
    rule = bound(ABS(base_batch=1, max_batch=4, alpha=math.inf, kappa=3))
    decisions = follow(rule, epochs(8, 1, 0.1, 8, 1, 0.1, 8))
    assert actions(decisions) == "ccgccgc"
    assert not rule.wants_eigenvalue(rule.initial())
    assert rule.threshold(rule.initial()) is None
    assert decisions[0].reason == "no growth for 1 of 3 decisions"
    assert decisions[2].reason == "no growth for 3 decisions: batch 1 → 2"


def test_lambda_alone_never_grows_by_patience():
    rule = bound(ABS(base_batch=1, max_batch=8, kappa=math.inf))
    decisions = follow(rule, epochs(*[8] * 50, 4, *[4] * 50, 2))
    assert [i for i, d in enumerate(decisions) if d.action == "grow"] == [50, 101]
    assert {d.cause for d in decisions} == {None, "eigenvalue"}


JOB = """
name = "a"
data = { name = "digits" }
model = { name = "m" }
train = { epochs = 40, microbatch = 32, lr = 0.1 }
schedule = { method = "absa", base_batch = 32, max_batch = 256 }
"""


@pytest.mark.parametrize("key", ["alpha", "kappa"])
def test_infinite_keys_in_a_job_file(key):
    job = config.parse(JOB, "test", (f"schedule.{key}=inf",))
    assert config.parse(config.dump(job), "dump") == job
    plans = plan(job, 640, 8)
    if key == "alpha":
        (planned,) = plans.values()
        assert [round(phase.epochs) for phase in planned.phases] == [10, 10, 10, 10]
    else:
        assert len(plans["latest"].phases) == 1
        assert plans["earliest"].phases[-1].global_batch == 256


@pytest.mark.parametrize("value", ["0", "-1", "2.5", "nan"])
def test_patience_is_a_whole_number_or_infinite(value):
    with pytest.raises(UsageError, match=r"schedule\.kappa"):
        config.parse(JOB, "test", (f"schedule.kappa={value}",))


# Random growth


def random_rule(rate=0.2, seed=0, max_batch=2**40):
    schedule = RandomGrowth(base_batch=1, max_batch=max_batch, rate=rate)
    return schedule.bind(bound(schedule)._train, seed)


def gaps(rule, count):
    grown = [i for i, d in enumerate(follow(rule, epochs(*[None] * count))) if d.action == "grow"]
    return [b - a for a, b in zip([-1, *grown], grown, strict=False)]


@pytest.mark.parametrize("rate", [0.1, 0.5, 1.0])
def test_the_rate_is_the_expected_number_of_growths_at_a_decision(rate):
    seen = [gap for seed in range(60) for gap in gaps(random_rule(rate, seed), 400)[:30]]
    mean, n = statistics.fmean(seen), len(seen)
    assert abs(mean - 1 / rate) < 4 * math.sqrt((1 - rate) / n) / rate + 1e-9
    assert min(seen) == 1


def test_the_same_seed_grows_at_the_same_points_and_another_does_not():
    assert gaps(random_rule(seed=1), 100) == gaps(random_rule(seed=1), 100)
    assert gaps(random_rule(seed=1), 100) != gaps(random_rule(seed=2), 100)


def test_a_resume_in_between_decides_the_same():
    rule, seen = random_rule(), epochs(*[None] * 30)
    whole = follow(rule, seen)
    for stop, decision in enumerate(whole):
        assert (
            follow(rule, seen[stop + 1 :], RandomState(**vars(decision.state))) == whole[stop + 1 :]
        )


def test_random_growth_measures_nothing_and_its_plan_is_exact():
    table = 'schedule = { method = "random", base_batch = 32, max_batch = 256, rate = 0.2 }'
    text = JOB[: JOB.index("schedule")] + table
    job = config.parse(text, "test", ("seed=3",))
    (planned,) = plan(job, 640, 8).values()
    rule = job.schedule.bind(job.train, 3)
    assert not rule.wants_eigenvalue(rule.initial())
    points = follow(rule, epochs(*[None] * 40))
    grown = [i for i, d in enumerate(points, start=1) if d.action == "grow"]
    begin = 0.0
    for phase, end in zip(planned.phases, grown, strict=False):
        begin += phase.epochs
        assert round(begin) == end


# Why the batch grew

NOISY = [[step(1e9)]]


@pytest.mark.parametrize(
    ("schedule", "seen", "steps", "cause"),
    [
        (ABS(base_batch=1, max_batch=8), epochs(8, 4), (), "eigenvalue"),
        (ABSA(base_batch=1, max_batch=8, kappa=2), epochs(8, 8), (), "patience"),
        (ABS(base_batch=1, max_batch=8, kappa=2), epochs(8, 4), (), "eigenvalue"),
        (GG(base_batch=1, max_batch=8), epochs(None, None), (), "schedule"),
        (Seesaw(base_batch=1, max_batch=8), epochs(None, None), (), "schedule"),
        (Steps(base_batch=1, batches="2e:4"), epochs(None, None), (), "schedule"),
        (RandomGrowth(base_batch=1, max_batch=8, rate=1), epochs(None), (), "random"),
        (GNS(base_batch=2, max_batch=8), epochs(None), NOISY, "gradients"),
        (NormTest(base_batch=2, max_batch=8), epochs(None), NOISY, "gradients"),
    ],
    ids=lambda value: getattr(value, "method", None),
)
def test_the_cause_of_a_growth(schedule, seen, steps, cause):
    decisions = follow(bound(schedule, milestones=(2,)), seen, steps=steps)
    assert decisions[-1].action == "grow"
    assert decisions[-1].cause == cause
    assert [d.cause for d in decisions[:-1]] == [None] * (len(seen) - 1)


class Own(Rule):
    """Grows at once, for a cause that its argument names."""

    def __init__(self, cause=None):
        self.cause = cause

    def initial(self):
        return ScheduleState(32, 0.1)

    def decide(self, state, seen):
        return Decision("grow", "why", ScheduleState(64, 0.1), self.cause)


@pytest.mark.parametrize(
    ("argument", "cause"), [("", "user-defined"), (", cause = 'mine'", "mine")]
)
def test_the_cause_of_a_user_defined_rule(argument, cause):
    method = "tests.schedules.test_controls:Own"
    table = f'schedule = {{ method = "{method}", base_batch = 32{argument} }}'
    job = config.parse(JOB[: JOB.index("schedule")] + table, "test")
    rule = job.schedule.bind(job.train)
    assert rule.decide(rule.initial(), at(1)).cause == cause


def test_batches_of_random_growth_end_at_the_maximum():
    assert batches(follow(random_rule(1.0, max_batch=6), epochs(*[None] * 4))) == [2, 4, 6, 6]
