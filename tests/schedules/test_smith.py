"""GG: the batch grows where the learning rate would have decayed."""

import itertools

import pytest

from hpc_absa.schedules.rule import Milestones
from hpc_absa.schedules.smith import GoogleRule
from tests.schedules.tables import actions, at, batches, follow, rates

EPOCHS = [at(e) for e in range(1, 9)]


def rule(largest, decay=0.2, base=128, microbatch=128):
    return GoogleRule(base, largest, microbatch, 0.1, Milestones((2, 4, 6), decay))


@pytest.mark.parametrize(
    ("largest", "sizes", "lrs"),
    [
        (128, [128] * 4, [0.1, 0.02, 0.004, 0.0008]),
        (640, [128, 640, 640, 640], [0.1, 0.1, 0.02, 0.004]),
        (1280, [128, 640, 1280, 1280], [0.1, 0.1, 0.04, 0.008]),
        (16000, [128, 640, 3200, 16000], [0.1] * 4),
    ],
)
def test_growth_up_to_the_cap_and_the_rest_to_the_rate(largest, sizes, lrs):
    decisions = follow(rule(largest), EPOCHS)
    assert batches(decisions)[::2] == sizes
    assert rates(decisions)[::2] == pytest.approx(lrs)
    grown = "".join("g" if b > a else "c" for a, b in itertools.pairwise(sizes))
    assert actions(decisions)[1:6:2] == grown
    assert actions(decisions)[::2] == "cccc"


def test_what_batch_and_rate_do_together_is_the_decay():
    for decision, passed in zip(follow(rule(1280), EPOCHS), [0, 1, 1, 2, 2, 3, 3, 3], strict=True):
        state = decision.state
        assert state.lr / state.global_batch == pytest.approx(0.1 / 128 * 0.2**passed)


def test_several_milestones_at_one_boundary():
    (decision,) = follow(rule(16000), [at(5)])
    assert decision.state.global_batch == 3200


def test_a_batch_of_a_fractional_factor_is_whole_microbatches():
    (decision,) = follow(rule(10**6, decay=0.3), [at(2)])
    assert decision.state.global_batch == 3 * 128
    assert decision.state.lr == pytest.approx(0.1 * 0.9)


def test_the_reason_says_what_moved():
    decisions = follow(rule(1280), EPOCHS)
    assert decisions[1].reason == "milestone at epoch 2: batch 128 → 640"
    assert decisions[3].reason == (
        "milestone at epoch 4: batch 640 → 1280, learning rate 0.1 → 0.04"
    )
    assert decisions[5].reason == (
        "milestone at epoch 6: batch stays at its maximum 1280, learning rate 0.04 → 0.008"
    )


def test_it_grows_at_milestones_that_are_no_decision_points():
    assert actions(follow(rule(640), [at(2, decision_point=False)])) == "g"


@pytest.mark.parametrize(("exponent", "factor"), [(0.0, 1), (0.5, 5**0.5), (1.0, 5)])
def test_growth_may_raise_the_rate_as_well(exponent, factor):
    of = GoogleRule(128, 640, 128, 0.1, Milestones((2, 4), 0.2), exponent)
    assert rates(follow(of, EPOCHS[:4])) == pytest.approx(
        [0.1, 0.1 * factor, 0.1 * factor, 0.02 * factor]
    )


def test_a_resume_in_between_decides_the_same():
    whole = follow(rule(1280), EPOCHS)
    for stop, decision in enumerate(whole):
        assert follow(rule(1280), EPOCHS[stop + 1 :], decision.state) == whole[stop + 1 :]


def test_no_eigenvalue_is_wanted():
    assert not rule(640).wants_eigenvalue(rule(640).initial())
