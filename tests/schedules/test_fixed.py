"""BL and FB: constant batch, milestones, warm-up, cosine."""

import math

import pytest

from hpc_absa.schedules.fixed import Constant
from hpc_absa.schedules.rule import Milestones, Rate
from tests.schedules.tables import actions, at, batches, follow, rates

MILESTONES = Milestones((2, 4), 0.1)
BL = Constant(640, 0.1, MILESTONES)
FB = Constant(640, 0.5, MILESTONES, Rate(5, 1 / 5))


@pytest.mark.parametrize("rule", [BL, FB])
def test_the_batch_is_constant_and_no_eigenvalue_is_wanted(rule):
    decisions = follow(rule, [at(e, 1 / e) for e in range(1, 7)])
    assert batches(decisions) == [640] * 6
    assert actions(decisions) == "cccccc"
    assert not rule.wants_eigenvalue(rule.initial())


@pytest.mark.parametrize(("rule", "rate"), [(BL, 0.1), (FB, 0.5)])
def test_the_rate_falls_once_at_each_milestone(rule, rate):
    decisions = follow(rule, [at(e / 2, decision_point=e % 2 == 0) for e in range(1, 11)])
    factors = [1, 1, 1, 0.1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01]
    assert rates(decisions) == pytest.approx([rate * f for f in factors])
    assert "milestone at epoch 2: learning rate" in decisions[3].reason


def test_milestones_passed_between_two_boundaries_all_count():
    assert rates(follow(BL, [at(5)])) == pytest.approx([0.001])


def test_a_milestone_at_a_fraction_before_an_epoch_s_end_is_not_met():
    assert rates(follow(BL, [at(1.999)])) == [0.1]


@pytest.mark.parametrize(
    ("epoch", "rate"), [(0, 0.1), (1, 0.18), (2.5, 0.3), (4.999, 0.49992), (5, 0.5), (50, 0.5)]
)
def test_fb_warms_up_linearly(epoch, rate):
    assert FB.lr(FB.initial(), epoch) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("epoch", "factor"),
    [(0, 1), (5, 0.5 * (1 + math.sqrt(0.5))), (10, 0.5), (15, 0.5 * (1 - math.sqrt(0.5)))],
)
def test_cosine_falls_to_zero_with_the_last_epoch(epoch, factor):
    rule = Constant(640, 0.1, Milestones((), 0.1), Rate(cosine_until=20))
    assert rule.lr(rule.initial(), epoch) == pytest.approx(0.1 * factor)
    assert rule.lr(rule.initial(), 20) == rule.lr(rule.initial(), 20.5) == 0


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.1), (2.5, 0.3), (5, 0.5), (10, 0.25), (15, 0.0)])
def test_cosine_begins_where_warm_up_ends(epoch, rate):
    rule = Constant(640, 0.5, Milestones((), 0.1), Rate(5, 1 / 5, 15))
    assert rule.lr(rule.initial(), epoch) == pytest.approx(rate)


def test_a_milestone_within_the_warm_up_lowers_what_it_leads_to():
    (decision,) = follow(FB, [at(2)])
    assert FB.lr(decision.state, 2) == pytest.approx(0.01 + (0.05 - 0.01) * 2 / 5)


def test_bl_has_no_warm_up():
    assert BL.lr(BL.initial(), 0) == 0.1
