"""The job's `[schedule]` as a rule."""

import pytest

from hpc_absa import config
from hpc_absa.schedules import build
from hpc_absa.schedules.absa import AdaptiveBatch, Adversarial
from hpc_absa.schedules.fixed import Constant
from hpc_absa.schedules.noise import NoiseScale
from hpc_absa.schedules.rule import Growth, Milestones, Rate
from hpc_absa.schedules.smith import GoogleRule

JOB = """
name = "a"
data = { name = "digits" }
model = { name = "m" }
train = { epochs = 90, microbatch = 32, lr = 0.1, milestones = [30, 60], lr_decay = 0.5 }
[schedule]
base_batch = 64
max_batch = 256
"""
MILESTONES = Milestones((30, 60), 0.5)


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["method=bl"], Constant(256, 0.1, MILESTONES)),
        (["method=bl", "lr_rule=square-root"], Constant(256, 0.2, MILESTONES)),
        (["method=bl", "warmup_epochs=1"], Constant(256, 0.1, MILESTONES, Rate(1.0, 0.1))),
        (["method=fb"], Constant(256, 0.4, MILESTONES, Rate(5.0, 0.25))),
        (["method=fb", "warmup_epochs=2.5"], Constant(256, 0.4, MILESTONES, Rate(2.5, 0.25))),
        (["method=fb", "max_batch=64"], Constant(64, 0.1, MILESTONES, Rate(5.0, 1.0))),
        (["method=fb", "warmup_epochs=0"], Constant(256, 0.4, MILESTONES)),
        (["method=fb", "warmup_from=0"], Constant(256, 0.4, MILESTONES, Rate(5.0, 0.0))),
        (["method=gg"], GoogleRule(64, 256, 32, 0.1, MILESTONES)),
        (
            ["method=gg", "lr_rule=linear", "warmup_epochs=1", "warmup_from=0.5"],
            GoogleRule(64, 256, 32, 0.1, MILESTONES, 1.0, Rate(1.0, 0.5)),
        ),
        (
            ["method=abs", "alpha=3", "beta=4", "kappa=5", "lr_rule=none"],
            AdaptiveBatch(64, 0.1, Growth(4, 256, 0.0), 3.0, 5, MILESTONES),
        ),
        (
            ["method=absa", "ratio=0.3", "omega=4"],
            AdaptiveBatch(
                64, 0.1, Growth(2, 256), 2.0, 10, MILESTONES, 1, Adversarial(0.3, 4.0, until=45.0)
            ),
        ),
        (
            ["method=absa-tuned"],
            AdaptiveBatch(
                64, 0.1, Growth(2, 256), 2.0, 5, MILESTONES, 2, Adversarial(0.2, 2.0, until=45.0)
            ),
        ),
        (
            ["method=gns", "gamma=0.5", "lr_rule=square-root"],
            NoiseScale(64, 0.1, Growth(2, 256, 0.5), 0.5, 32, MILESTONES),
        ),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_every_method_with_its_parameters(overrides, rule):
    job = config.parse(JOB, "test", tuple(f"schedule.{word}" for word in overrides))
    assert build(job) == rule


@pytest.mark.parametrize("method", ["bl", "fb", "abs", "absa", "absa-tuned", "gns"])
def test_cosine_goes_with_every_method_but_gg(method):
    text = JOB.replace(", milestones = [30, 60], lr_decay = 0.5", ', annealing = "cosine"')
    rule = build(config.parse(text, "test", (f"schedule.method={method}",)))
    warm = rule.rate.warmup_epochs
    assert rule.lr(rule.initial(), 90) == pytest.approx(0)
    middle = rule.lr(rule.initial(), warm + (90 - warm) / 2)
    assert middle == pytest.approx(rule.initial().lr / 2)


def test_max_batch_defaults_to_the_base_batch():
    text = JOB.replace("max_batch = 256", 'method = "bl"')
    assert build(config.parse(text, "test")).initial().global_batch == 64
