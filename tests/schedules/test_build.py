"""The job's `[schedule]` as a rule."""

import pytest

from hpc_absa import config
from hpc_absa.errors import UsageError
from hpc_absa.records import GradientSquares
from hpc_absa.schedules import (
    ABS,
    ABSA,
    BL,
    FB,
    GG,
    GNS,
    ABSATuned,
    NormTest,
    RandomGrowth,
    Rule,
    Seesaw,
    Steps,
    build,
)
from tests.schedules.tables import at, bound

JOB = """
name = "a"
data = { name = "digits" }
model = { name = "m" }
train = { epochs = 90, microbatch = 32, lr = 0.1, milestones = [30, 60], lr_decay = 0.5 }
[schedule]
base_batch = 64
max_batch = 256
"""
BATCHES = {"base_batch": 64, "max_batch": 256}


def job(*overrides, text=JOB):
    return config.parse(text, "test", tuple(f"schedule.{override}" for override in overrides))


@pytest.mark.parametrize(
    ("overrides", "schedule"),
    [
        (["method=bl"], BL(**BATCHES)),
        (["method=bl", "lr_rule=square-root"], BL(**BATCHES, lr_rule="square-root")),
        (["method=fb", "warmup_from=0"], FB(**BATCHES, warmup_from=0)),
        (["method=gg", "warmup_epochs=1"], GG(**BATCHES, warmup_epochs=1)),
        (["method=abs", "alpha=3", "beta=4", "kappa=5"], ABS(**BATCHES, alpha=3, beta=4, kappa=5)),
        (["method=absa", "ratio=0.3", "omega=4"], ABSA(**BATCHES, ratio=0.3, omega=4)),
        (["method=absa-tuned"], ABSATuned(**BATCHES)),
        (["method=gns", "gamma=0.5"], GNS(**BATCHES, gamma=0.5)),
        (["method=norm-test", "eta=0.2"], NormTest(**BATCHES, eta=0.2)),
        (["method=seesaw", "lr_rule=linear"], Seesaw(**BATCHES, lr_rule="linear")),
        (["method=steps", "batches=30e:128"], Steps(**BATCHES, batches="30e:128")),
        (["method=random", "rate=0.3"], RandomGrowth(**BATCHES, rate=0.3)),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_the_job_file_and_the_constructor_give_the_same_rule(overrides, schedule):
    parsed = job(*overrides)
    rule = build(parsed)
    assert isinstance(rule, Rule)
    assert parsed.schedule == schedule
    assert rule == schedule.bind(parsed.train)


@pytest.mark.parametrize(
    ("overrides", "batch", "lr", "first_lr"),
    [
        (["method=bl"], 256, 0.1, 0.1),
        (["method=bl", "lr_rule=square-root"], 256, 0.2, 0.2),
        (["method=bl", "warmup_epochs=1"], 256, 0.1, 0.01),
        (["method=fb"], 256, 0.4, 0.1),
        (["method=fb", "warmup_epochs=2.5"], 256, 0.4, 0.1),
        (["method=fb", "max_batch=64"], 64, 0.1, 0.1),
        (["method=fb", "warmup_epochs=0"], 256, 0.4, 0.4),
        (["method=fb", "warmup_from=0"], 256, 0.4, 0.0),
        (["method=gg"], 64, 0.1, 0.1),
        (["method=gg", "lr_rule=linear", "warmup_epochs=1", "warmup_from=0.5"], 64, 0.1, 0.05),
        (["method=abs", "warmup_epochs=1"], 64, 0.1, 0.01),
        (["method=absa"], 64, 0.1, 0.1),
        (["method=absa-tuned"], 64, 0.1, 0.1),
        (["method=gns"], 64, 0.1, 0.1),
        (["method=norm-test"], 64, 0.1, 0.1),
        (["method=seesaw", "warmup_epochs=1"], 64, 0.1, 0.01),
        (["method=steps", "batches=30e:128"], 64, 0.1, 0.1),
        (["method=random"], 64, 0.1, 0.1),
    ],
)
def test_the_first_batch_and_learning_rate(overrides, batch, lr, first_lr):
    rule = build(job(*overrides))
    state = rule.initial()
    assert (state.global_batch, state.lr) == (batch, pytest.approx(lr))
    assert rule.lr(state, 0) == pytest.approx(first_lr)
    assert rule.lr(state, 5) == pytest.approx(lr)


@pytest.mark.parametrize(
    ("overrides", "batch", "lr"),
    [
        (["method=bl"], 256, 0.05),
        (["method=gg"], 128, 0.1),
        (["method=gg", "lr_rule=linear"], 128, 0.2),
        (["method=abs", "beta=4", "kappa=1", "lr_rule=none"], 256, 0.05),
        (["method=absa", "kappa=1"], 128, 0.1),
        (["method=absa-tuned", "kappa=1"], 128, 0.1),
        (["method=gns", "lr_rule=square-root"], 128, 0.05 * 2**0.5),
        (["method=norm-test"], 256, 0.05),
        (["method=seesaw"], 128, 0.1 * 0.5**0.5),
        (["method=steps", "batches=30e:128", "lr_rule=linear"], 128, 0.1),
        (["method=random", "rate=1"], 128, 0.1),
    ],
)
def test_batch_and_learning_rate_at_the_first_milestone(overrides, batch, lr):
    rule = build(job(*overrides))
    state = rule.learn(rule.initial(), GradientSquares(2, 1.0, 0.5 + 1e-12))
    after = rule.decide(state, at(30)).state
    assert (after.global_batch, after.lr) == (batch, pytest.approx(lr))


@pytest.mark.parametrize(("method", "ratio", "omega"), [("absa", 0.3, 4), ("absa-tuned", 0.2, 2)])
def test_adversarial_examples_end_after_half_of_the_epochs(method, ratio, omega):
    rule = build(job(f"method={method}", f"ratio={ratio}", f"omega={omega}", "kappa=1"))
    state = rule.initial()
    assert rule.adversarial_fraction(state, 44.9) == ratio
    assert rule.adversarial_fraction(state, 45) == 0
    assert rule.decide(state, at(1)).state.adversarial_fraction == pytest.approx(ratio / omega)


@pytest.mark.parametrize(
    "method", ["bl", "fb", "abs", "absa", "absa-tuned", "gns", "norm-test", "steps", "random"]
)
def test_cosine_annealing_with_every_method_but_gg_and_seesaw(method):
    text = JOB.replace(", milestones = [30, 60], lr_decay = 0.5", ', annealing = "cosine"')
    parsed = job(f"method={method}", text=text)
    rule, warmup = build(parsed), parsed.schedule.warmup_epochs
    assert rule.lr(rule.initial(), 90) == pytest.approx(0)
    middle = rule.lr(rule.initial(), warmup + (90 - warmup) / 2)
    assert middle == pytest.approx(rule.initial().lr / 2)


def test_max_batch_defaults_to_the_base_batch():
    text = JOB.replace("max_batch = 256", 'method = "bl"')
    assert build(config.parse(text, "test")).initial().global_batch == 64


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (ABSA(base_batch=48), "schedule.base_batch = 48: expected a multiple of train.microbatch"),
        (GNS(base_batch=32), "schedule.base_batch = 32: expected at least two microbatches of 32"),
        (GG(base_batch=64), "train.annealing = 'cosine': expected 'milestones'"),
        (FB(base_batch=64, warmup_epochs=4), "schedule.warmup_epochs = 4: expected less than"),
    ],
)
def test_a_schedule_that_does_not_fit_the_settings(schedule, message):
    with pytest.raises(ValueError, match=message):
        bound(schedule, microbatch=32, epochs=4, annealing="cosine")


@pytest.mark.parametrize(
    ("schedule", "keys", "message"),
    [
        (ABSA, {}, "ABSA: base_batch: missing, expected a value"),
        (ABSA, {"base_batch": 0}, "ABSA: base_batch = 0: expected greater than 0"),
        (FB, {"base_batch": 64, "max_bach": 128},
         "FB: max_bach = 128: unknown key, expected 'max_batch'?"),
        (GG, {"base_batch": 64, "max_batch": 32},
         "GG: max_batch = 32: expected at least base_batch = 64"),
        (ABS, {"base_batch": "64", "beta": 1},
         "ABS: base_batch = '64': expected a valid integer (and 1 more)"),
    ],
)  # fmt: skip
def test_a_constructor_says_in_one_line_what_is_wrong(schedule, keys, message):
    with pytest.raises(UsageError) as caught:
        schedule(**keys)
    assert str(caught.value) == message
