"""Seesaw: half of each decay of the learning rate becomes growth of the batch."""

import itertools
import math

import pytest

from hpc_absa import config
from hpc_absa.plan import plan
from hpc_absa.schedules import GG, Seesaw
from tests.schedules.tables import actions, at, batches, bound, follow, lrs

EPOCHS = [at(e) for e in range(1, 9)]


def rule(max_batch=2**20, decay=0.5, base=128, **settings):
    keys = {k: settings.pop(k) for k in ("lr_rule", "warmup_epochs") if k in settings}
    schedule = Seesaw(base_batch=base, max_batch=max_batch, **keys)
    defaults = {"microbatch": 128, "milestones": (2, 4, 6), "lr_decay": decay}
    return bound(schedule, **defaults | settings)


def test_the_papers_rule_where_the_rate_would_halve():
    decisions = follow(rule(), EPOCHS)
    assert batches(decisions) == [128, 256, 256, 512, 512, 1024, 1024, 1024]
    assert lrs(decisions)[1::2] == pytest.approx([0.1 * 2 ** (-k / 2) for k in (1, 2, 3, 3)])
    assert actions(decisions) == "cgcgcgcc"
    assert decisions[1].reason == (
        "milestone at epoch 2: batch 128 → 256, learning rate 0.1 → 0.07071"
    )


@pytest.mark.parametrize(
    ("max_batch", "sizes", "rates"),
    [
        (128, [128] * 3, [0.05, 0.025, 0.0125]),
        # η·√B keeps the decay by ρ that the maximum cuts short: 0.1·ρ^k / sqrt(B0/B)
        (384, [256, 384, 384], [0.05 * 2**0.5, 0.025 * 3**0.5, 0.0125 * 3**0.5]),
    ],
)
def test_what_the_maximum_does_not_allow_is_applied_to_the_learning_rate(max_batch, sizes, rates):
    decisions = follow(rule(max_batch), EPOCHS)
    assert batches(decisions)[1:6:2] == sizes
    assert lrs(decisions)[1:6:2] == pytest.approx(rates)


@pytest.mark.parametrize("decay", [0.1, 0.2, 0.5])
def test_the_learning_rate_times_the_root_of_the_batch_decays_as_without_growth(decay):
    for decision, passed in zip(
        follow(rule(640, decay), EPOCHS), [0, 1, 1, 2, 2, 3, 3, 3], strict=True
    ):
        state = decision.state
        effective = state.lr * math.sqrt(128 / state.global_batch)
        assert effective == pytest.approx(0.1 * decay**passed)


def test_with_the_linear_rule_it_is_gg():
    """The equivalent for SGD without normalization."""
    gg = bound(
        GG(base_batch=128, max_batch=512), microbatch=128, milestones=(2, 4, 6), lr_decay=0.5
    )
    ours = follow(rule(512, lr_rule="linear"), EPOCHS)
    theirs = follow(gg, EPOCHS)
    assert batches(ours) == batches(theirs)
    assert lrs(ours) == pytest.approx(lrs(theirs))


# Cosine


def cosine(**settings):
    return rule(milestones=(), annealing="cosine", epochs=100, **settings)


def test_the_cosine_is_followed_in_steps_of_the_decay():
    decisions = follow(cosine(max_batch=2**16), [at(e) for e in range(1, 100)])
    for decision, epoch in zip(decisions, range(1, 100), strict=True):
        left = (1 + math.cos(math.pi * epoch / 100)) / 2
        passed = math.floor(-math.log2(left) + 1e-9)
        batch = min(128 * 2**passed, 2**16)
        assert decision.state.global_batch == batch
        effective = decision.state.lr * math.sqrt(128 / batch)
        assert effective == pytest.approx(0.1 * 2.0**-passed)
    assert decisions[49].reason.startswith("cosine at 0.5: batch 128 → 256")


def test_the_learning_rate_of_a_step_is_not_annealed_a_second_time():
    followed = cosine(warmup_epochs=10)
    assert followed.lr(followed.initial(), 60) == 0.1
    assert followed.lr(followed.initial(), 5) == pytest.approx(0.055)


def test_the_plan_has_every_decay_of_the_cosine():
    text = """
    name = "a"
    data = { name = "digits" }
    model = { name = "m" }
    train = { epochs = 100, microbatch = 32, lr = 0.1, lr_decay = 0.5, annealing = "cosine" }
    schedule = { method = "seesaw", base_batch = 32, max_batch = 256 }
    """
    (planned,) = plan(config.parse(text, "test"), 3200, 8).values()
    ends = list(itertools.accumulate(phase.epochs for phase in planned.phases))
    assert [p.global_batch for p in planned.phases[:4]] == [32, 64, 128, 256]
    crossings = [math.ceil(200 / math.pi * math.acos(2 ** (-k / 2)) - 1e-9) for k in range(1, 10)]
    assert ends[:9] == pytest.approx(crossings, abs=0.5)


def test_a_cosine_needs_a_decay():
    with pytest.raises(ValueError, match=r"train\.lr_decay = 1: expected less with"):
        cosine(decay=1)
