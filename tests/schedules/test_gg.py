"""GG: the batch grows at milestones instead of a decay of the learning rate."""

import itertools

import pytest

from hpc_absa.schedules import GG
from tests.schedules.tables import actions, at, batches, bound, follow, lrs

EPOCHS = [at(e) for e in range(1, 9)]


def rule(max_batch, decay=0.2, **keys):
    schedule = GG(base_batch=128, max_batch=max_batch, **keys)
    return bound(schedule, microbatch=128, milestones=(2, 4, 6), lr_decay=decay)


@pytest.mark.parametrize(
    ("max_batch", "sizes", "rates"),
    [
        (128, [128] * 4, [0.1, 0.02, 0.004, 0.0008]),
        (640, [128, 640, 640, 640], [0.1, 0.1, 0.02, 0.004]),
        (1280, [128, 640, 1280, 1280], [0.1, 0.1, 0.04, 0.008]),
        (16000, [128, 640, 3200, 16000], [0.1] * 4),
    ],
)
def test_growth_up_to_the_maximum_and_a_decay_by_the_rest(max_batch, sizes, rates):
    decisions = follow(rule(max_batch), EPOCHS)
    assert batches(decisions)[::2] == sizes
    assert lrs(decisions)[::2] == pytest.approx(rates)
    grown = "".join("g" if b > a else "c" for a, b in itertools.pairwise(sizes))
    assert actions(decisions)[1:6:2] == grown
    assert actions(decisions)[::2] == "cccc"


def test_the_ratio_of_learning_rate_and_batch_decays_at_milestones():
    for decision, passed in zip(follow(rule(1280), EPOCHS), [0, 1, 1, 2, 2, 3, 3, 3], strict=True):
        state = decision.state
        assert state.lr / state.global_batch == pytest.approx(0.1 / 128 * 0.2**passed)


def test_several_milestones_at_one_boundary():
    (decision,) = follow(rule(16000), [at(5)])
    assert decision.state.global_batch == 3200


def test_growth_by_a_fractional_factor_is_rounded_to_microbatches():
    (decision,) = follow(rule(128 * 10**4, decay=0.3), [at(2)])
    assert decision.state.global_batch == 3 * 128
    assert decision.state.lr == pytest.approx(0.1 * 0.9)


def test_the_reason_names_what_changed():
    decisions = follow(rule(1280), EPOCHS)
    assert decisions[1].reason == "milestone at epoch 2: batch 128 → 640"
    assert decisions[3].reason == (
        "milestone at epoch 4: batch 640 → 1280, learning rate 0.1 → 0.04"
    )
    assert decisions[5].reason == (
        "milestone at epoch 6: batch stays at its maximum 1280, learning rate 0.04 → 0.008"
    )
    (small,) = follow(rule(1280, decay=0.9), EPOCHS[1:2])  # less than another microbatch
    assert small.reason == "milestone at epoch 2: batch stays at 128, learning rate 0.1 → 0.09"


def test_a_batch_does_not_fall_where_a_run_is_continued_with_later_milestones():
    """As little as 0.2 of a microbatch, rounded, would be a batch of 0."""
    before = follow(rule(640), EPOCHS[:4])[-1].state
    later = bound(GG(base_batch=128, max_batch=640), microbatch=128, milestones=(6, 8))
    decisions = follow(later, EPOCHS[4:], before)
    assert batches(decisions) == [640] * 4
    assert lrs(decisions) == [before.lr] * 4


def test_growth_at_milestones_between_decision_points():
    assert actions(follow(rule(640), [at(2, decision_point=False)])) == "g"


@pytest.mark.parametrize(
    ("lr_rule", "factor"), [("none", 1), ("square-root", 5**0.5), ("linear", 5)]
)
def test_the_learning_rate_follows_the_batch_by_lr_rule(lr_rule, factor):
    decisions = follow(rule(640, lr_rule=lr_rule), EPOCHS[:4])
    assert lrs(decisions) == pytest.approx([0.1, 0.1 * factor, 0.1 * factor, 0.02 * factor])


def test_a_resume_in_between_decides_the_same():
    whole = follow(rule(1280), EPOCHS)
    for stop, decision in enumerate(whole):
        assert follow(rule(1280), EPOCHS[stop + 1 :], decision.state) == whole[stop + 1 :]


def test_no_eigenvalue_is_wanted():
    assert not rule(640).wants_eigenvalue(rule(640).initial())
