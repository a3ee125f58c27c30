"""The job's `[schedule]` as a rule."""

import pytest

from hpc_absa import job as jobs
from hpc_absa.schedules import build
from hpc_absa.schedules.absa import AdaptiveBatch, Adversarial
from hpc_absa.schedules.fixed import Baseline, FacebookRule
from hpc_absa.schedules.rule import Milestones
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
        (["method=bl"], Baseline(256, 0.1, MILESTONES)),
        (["method=fb", "warmup_epochs=2.5"], FacebookRule(256, 0.1, MILESTONES, 64, 2.5)),
        (["method=gg"], GoogleRule(64, 256, 32, 0.1, MILESTONES)),
        (
            ["method=abs", "alpha=3", "beta=4", "kappa=5"],
            AdaptiveBatch(64, 256, 0.1, 3.0, 4, 5, MILESTONES),
        ),
        (
            ["method=absa", "ratio=0.3", "omega=4"],
            AdaptiveBatch(64, 256, 0.1, 2.0, 2, 10, MILESTONES, Adversarial(0.3, 4.0, until=45.0)),
        ),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_every_method_with_its_parameters(overrides, rule):
    job = jobs.parse(JOB, "test", tuple(f"schedule.{word}" for word in overrides))
    assert build(job) == rule


def test_max_batch_defaults_to_the_base_batch():
    text = JOB.replace("max_batch = 256", 'method = "bl"')
    assert build(jobs.parse(text, "test")).initial().global_batch == 64
