"""BL and FB: constant batch, milestones, warm-up, cosine."""

import math

import pytest

from hpc_absa.schedules import BL, FB
from tests.schedules.tables import actions, at, batches, bound, follow, lrs

BATCHES = {"base_batch": 128, "max_batch": 640}
bl = bound(BL(**BATCHES), milestones=(2, 4))
fb = bound(FB(**BATCHES), milestones=(2, 4))


@pytest.mark.parametrize("rule", [bl, fb])
def test_the_batch_is_constant_and_no_eigenvalue_is_wanted(rule):
    decisions = follow(rule, [at(e, 1 / e) for e in range(1, 7)])
    assert batches(decisions) == [640] * 6
    assert actions(decisions) == "cccccc"
    assert not rule.wants_eigenvalue(rule.initial())


@pytest.mark.parametrize(("rule", "lr"), [(bl, 0.1), (fb, 0.5)])
def test_the_learning_rate_decays_once_at_each_milestone(rule, lr):
    decisions = follow(rule, [at(e / 2, decision_point=e % 2 == 0) for e in range(1, 11)])
    factors = [1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]
    assert lrs(decisions) == pytest.approx([lr * f for f in factors])
    assert "milestone at epoch 2: learning rate" in decisions[3].reason


def test_all_milestones_between_two_boundaries_apply():
    assert lrs(follow(bl, [at(5)])) == pytest.approx([0.001])


@pytest.mark.parametrize("milestones", [(), (8,)])
def test_a_run_that_is_continued_with_later_milestones_has_their_learning_rate(milestones):
    before = follow(bl, [at(2)])[-1].state
    (decision,) = follow(bound(BL(**BATCHES), milestones=milestones), [at(3)], before)
    assert decision.state.lr == pytest.approx(0.1)
    assert decision.reason == "no milestone yet: learning rate 0.01 → 0.1"


def test_a_milestone_does_not_apply_just_before_its_epoch_ends():
    assert lrs(follow(bl, [at(1.999)])) == [0.1]


@pytest.mark.parametrize(
    ("epoch", "lr"), [(0, 0.1), (1, 0.18), (2.5, 0.3), (4.999, 0.49992), (5, 0.5), (50, 0.5)]
)
def test_fb_warms_up_linearly(epoch, lr):
    assert fb.lr(fb.initial(), epoch) == pytest.approx(lr)


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [(0, 1), (5, 0.5 * (1 + math.sqrt(0.5))), (10, 0.5), (15, 0.5 * (1 - math.sqrt(0.5)))],
)
def test_cosine_falls_to_zero_with_the_last_epoch(epoch, factor):
    rule = bound(BL(**BATCHES), annealing="cosine", epochs=20)
    assert rule.lr(rule.initial(), epoch) == pytest.approx(0.1 * factor)
    assert rule.lr(rule.initial(), 20) == rule.lr(rule.initial(), 20.5) == 0


@pytest.mark.parametrize(("epoch", "lr"), [(0, 0.1), (2.5, 0.3), (5, 0.5), (10, 0.25), (15, 0.0)])
def test_cosine_begins_after_warm_up(epoch, lr):
    rule = bound(FB(**BATCHES), annealing="cosine", epochs=15)
    assert rule.lr(rule.initial(), epoch) == pytest.approx(lr)


def test_a_milestone_during_warm_up_lowers_its_target():
    (decision,) = follow(fb, [at(2)])
    assert fb.lr(decision.state, 2) == pytest.approx(0.01 + (0.05 - 0.01) * 2 / 5)


def test_bl_has_no_warm_up():
    assert bl.lr(bl.initial(), 0) == 0.1
