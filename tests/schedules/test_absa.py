"""ABS and ABSA over scripted eigenvalues."""

import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_absa.checkpoint import Content, Group, file
from hpc_absa.records import Eigenvalue, Observation, ScheduleState
from hpc_absa.schedules import ABS, ABSA
from tests.schedules.tables import (
    actions,
    at,
    batches,
    bound,
    estimate,
    follow,
    lrs,
    unconverged,
)

NEVER = 10**6


def abs_(max_batch=8, milestones=(), **keys):
    schedule = ABS(base_batch=1, max_batch=max_batch, **{"kappa": NEVER} | keys)
    return bound(schedule, milestones=milestones)


def absa(max_batch=8, epochs=NEVER, **keys):
    schedule = ABSA(base_batch=1, max_batch=max_batch, **{"kappa": NEVER} | keys)
    return bound(schedule, epochs=epochs)


def boundaries(*eigenvalues):
    return [at(epoch, value) for epoch, value in enumerate(eigenvalues, start=1)]


# Growth by ratio


@pytest.mark.parametrize(
    ("eigenvalues", "wanted"),
    [
        ([8, 8, 8], "ccc"),
        ([8, 4.01, 4], "ccg"),
        ([8, 4, 2, 1], "cggg"),
        ([8, 4, 2.01, 2], "cgcg"),
        ([8, 9, 4], "ccg"),
        ([8, 100, 50], "ccc"),
        ([8, 1, 1, 0.5], "cgcg"),
    ],
)
def test_growth_once_the_eigenvalue_has_halved(eigenvalues, wanted):
    assert actions(follow(abs_(), boundaries(*eigenvalues))) == wanted


def test_batch_lr_reference_and_patience_count_after_growth():
    state = follow(abs_(beta=3, max_batch=27), boundaries(9, 8, 4))[-1].state
    assert state == ScheduleState(3, pytest.approx(0.3), 0.0, reference=4.0, patience_count=0)


def test_the_last_growth_is_cut_to_the_maximum_with_its_learning_rate():
    decisions = follow(abs_(max_batch=3), boundaries(8, 4, 2))
    assert batches(decisions) == [1, 2, 3]
    assert lrs(decisions) == pytest.approx([0.1, 0.2, 0.3])


def test_alpha_is_the_ratio_that_growth_needs():
    assert actions(follow(abs_(alpha=4), boundaries(8, 4, 2))) == "ccg"


# Growth after kappa decisions


@pytest.mark.parametrize(("kappa", "wanted"), [(1, "gggc"), (2, "cgcgcgc"), (3, "ccgccg")])
def test_growth_after_kappa_decisions_without_growth(kappa, wanted):
    assert actions(follow(abs_(kappa=kappa), boundaries(*[8] * len(wanted)))) == wanted


def test_patience_count_restarts_after_growth_by_ratio():
    assert actions(follow(abs_(kappa=3), boundaries(8, 4, 4, 4, 4))) == "cgccg"


@pytest.mark.parametrize(("after", "reference"), [("keep", 8.0), ("reset", 100.0)])
def test_the_reference_after_growth_by_patience(after, reference):
    rule = abs_(kappa=2, reference_after_patience=after)
    state = follow(rule, boundaries(8, 100))[-1].state
    assert (state.global_batch, state.reference) == (2, reference)


@pytest.mark.parametrize("after", ["keep", "reset"])
def test_the_first_eigenvalue_that_can_be_used_is_the_reference_also_at_growth_by_patience(after):
    decisions = follow(abs_(kappa=2, reference_after_patience=after), boundaries(None, 8))
    assert (decisions[-1].cause, decisions[-1].state.reference) == ("patience", 8.0)


def test_the_reason_of_growth_after_kappa_decisions():
    assert (
        follow(abs_(kappa=2), boundaries(8, 8))[-1].reason
        == "no growth for 2 decisions: batch 1 → 2"
    )


# Eigenvalues that cannot be used

UNUSABLE = [
    estimate(-1.0),
    estimate(0.0),
    estimate(math.nan),
    estimate(math.inf),
    estimate(-math.inf),
    unconverged(0.1),
    unconverged(math.nan),
    None,
]


@pytest.mark.parametrize("unusable", UNUSABLE, ids=str)
def test_an_unusable_eigenvalue_never_grows_the_batch(unusable):
    decisions = follow(abs_(), boundaries(8, unusable, unusable, unusable))
    assert actions(decisions) == "cccc"
    assert decisions[-1].state.reference == 8.0
    assert decisions[-1].reason.endswith(": no growth")


@pytest.mark.parametrize("unusable", UNUSABLE, ids=str)
def test_an_unusable_eigenvalue_never_becomes_the_reference(unusable):
    decisions = follow(abs_(), boundaries(unusable, 8, 4))
    assert actions(decisions) == "ccg"
    assert [d.state.reference for d in decisions] == [None, 8.0, 4.0]


@pytest.mark.parametrize("unusable", UNUSABLE, ids=str)
def test_an_unusable_eigenvalue_counts_towards_kappa_and_keeps_the_reference(unusable):
    decisions = follow(abs_(kappa=3), boundaries(8, unusable, unusable, 4))
    assert actions(decisions) == "ccgg"
    assert decisions[2].state.reference == 8.0
    assert "no growth for 3 decisions" in decisions[2].reason


def test_growth_after_kappa_decisions_without_a_reference():
    decisions = follow(abs_(kappa=2), boundaries(None, unconverged(5.0), 8, 4))
    assert actions(decisions) == "cgcg"
    assert decisions[1].state.reference is None


# Fewer estimates before the first growth


@pytest.mark.parametrize(
    ("every", "kappa", "eigenvalues", "wanted", "estimated"),
    [
        # The first estimate is the reference; then every third decision until the first growth.
        (3, NEVER, [8, 1, 4, 4, 2], "ccgcg", "1.111"),
        (3, NEVER, [8, 1, 8, 1, 1, 8, 1, 1, 4], "ccccccccg", "1.1..1..1"),
        # An unusable estimate is repeated at the next decision.
        (3, NEVER, [None, 8, 1, 1, 1, 4], "ccgccc", "111111"),
        # At the kappa-th decision the next reference is estimated.
        (4, 3, [8, 1, 8, 4], "ccgg", "1.11"),
        (1, NEVER, [8, 8, 8], "ccc", "111"),
    ],
)
def test_estimates_before_the_first_growth(every, kappa, eigenvalues, wanted, estimated):
    rule = abs_(estimate_every=every, kappa=kappa)
    decisions = follow(rule, boundaries(*eigenvalues))
    assert actions(decisions) == wanted
    states = [rule.initial(), *(d.state for d in decisions)]
    wants = ["1" if rule.wants_eigenvalue(state) else "." for state in states[:-1]]
    assert "".join(wants) == estimated


def test_the_reason_of_a_decision_without_an_estimate():
    decisions = follow(abs_(estimate_every=3), boundaries(8, 1))
    assert decisions[1].reason == "λ was not estimated: no growth"


@pytest.mark.parametrize(
    ("lr_rule", "factor"), [("none", 1), ("square-root", 2**0.5), ("linear", 2)]
)
def test_the_learning_rate_follows_the_batch_by_lr_rule(lr_rule, factor):
    decisions = follow(abs_(lr_rule=lr_rule), boundaries(8, 4, 2))
    assert lrs(decisions) == pytest.approx([0.1, 0.1 * factor, 0.1 * factor**2])


# The maximum


def test_no_estimate_is_wanted_at_the_maximum():
    rule = abs_(max_batch=2)
    decisions = follow(rule, boundaries(8, 4, 0.1, 0.01))
    wants = [rule.wants_eigenvalue(d.state) for d in decisions]
    assert wants == [True, False, False, False]
    assert actions(decisions) == "cgcc"
    assert decisions[-1].reason == "batch is at its maximum 2"


def test_with_max_batch_equal_to_base_batch_nothing_changes():
    rule = absa(max_batch=1)
    assert not rule.wants_eigenvalue(rule.initial())
    assert rule.initial().adversarial_fraction == 0.0
    assert actions(follow(rule, boundaries(8, 4, 2))) == "ccc"


# Milestones


def test_a_milestone_and_growth_at_the_same_boundary():
    decision = follow(abs_(milestones=(2,)), boundaries(8, 4))[-1]
    assert decision.action == "grow"
    assert decision.state.lr == pytest.approx(0.1 * 0.1 * 2)
    assert decision.state.milestones_passed == 1
    assert "λ 4 ≤ 8/2: batch 1 → 2; milestone at epoch 2" in decision.reason


def test_milestones_apply_at_the_maximum_and_between_decision_points():
    seen = [at(1, 8), at(2, decision_point=False), at(2.5, 4), at(3, decision_point=False)]
    decisions = follow(abs_(max_batch=2, milestones=(2, 3)), seen)
    assert actions(decisions) == "ccgc"
    assert lrs(decisions) == pytest.approx([0.1, 0.01, 0.02, 0.002])


def test_a_boundary_that_is_no_decision_point_does_not_count_towards_kappa():
    decisions = follow(abs_(kappa=3), [at(e, 8, decision_point=e % 2 == 0) for e in range(1, 7)])
    assert actions(decisions) == "cccccg"
    assert [d.state.patience_count for d in decisions] == [0, 1, 1, 2, 2, 0]


# Adversarial examples


@pytest.mark.parametrize(
    ("rule", "fractions"),
    [
        (absa(max_batch=16), [0.2, 0.1, 0.05, 0.025]),
        (absa(max_batch=4), [0.2, 0.1, 0.0, 0.0]),
        (absa(max_batch=16, epochs=6), [0.2, 0.1, 0.0, 0.0]),
        (absa(max_batch=16, epochs=5), [0.2, 0.1, 0.0, 0.0]),
        (absa(max_batch=16, omega=1.0), [0.2] * 4),
        (absa(max_batch=16, ratio=0.0), [0.0] * 4),
        (abs_(max_batch=16), [0.0] * 4),
    ],
)
def test_the_adversarial_fraction_shrinks(rule, fractions):
    decisions = follow(rule, boundaries(8, 4, 2, 1))
    assert [d.state.adversarial_fraction for d in decisions] == pytest.approx(fractions)


def test_adversarial_examples_end_after_half_the_epochs_at_any_boundary():
    decisions = follow(absa(epochs=4), [at(1.5), at(2, decision_point=False)])
    assert [d.state.adversarial_fraction for d in decisions] == [0.2, 0.0]


@pytest.mark.parametrize(("epoch", "fraction"), [(0, 0.2), (2.49, 0.2), (2.5, 0), (3, 0)])
def test_adversarial_examples_end_after_half_the_epochs_within_an_epoch(epoch, fraction):
    rule = absa(epochs=5)
    assert rule.adversarial_fraction(rule.initial(), epoch) == fraction


def test_the_initial_state():
    assert absa().initial() == ScheduleState(1, 0.1, adversarial_fraction=0.2)


# Limits, and the same decisions after a resume


EIGENVALUES = st.lists(
    st.one_of(
        st.floats(0.01, 100).map(estimate),
        st.sampled_from([*UNUSABLE[:4], unconverged(0.01), None]),
    ),
    max_size=12,
)


@given(EIGENVALUES, st.integers(1, 4))
def test_limits_hold_for_any_eigenvalues(eigenvalues, kappa):
    decisions = follow(absa(max_batch=12, kappa=kappa), boundaries(*eigenvalues))
    patience_count = 0
    for decision in decisions:
        state = decision.state
        assert 1 <= state.global_batch <= 12
        assert state.lr == pytest.approx(0.1 * state.global_batch)
        assert 0 <= state.adversarial_fraction <= 0.2
        assert state.patience_count < kappa
        assert state.reference is None or state.reference > 0
        patience_count = 0 if decision.action == "grow" else patience_count + 1
        assert patience_count < kappa or state.global_batch == 12


@pytest.mark.parametrize("stop", range(8))
def test_a_resume_in_between_decides_the_same(tmp_path, stop):
    """The state is saved as a checkpoint's attributes."""
    seen = boundaries(None, 8, 9, 4, unconverged(1.0), 3, 2, 0.9)
    schedule = ABSA(base_batch=1, max_batch=8, kappa=4, estimate_every=2, omega=3.0)
    rule = bound(schedule, milestones=(3, 5), lr_decay=0.2, epochs=12)
    whole = follow(rule, seen)
    state = whole[stop].state
    attributes = {key: value for key, value in asdict(state).items() if value is not None}
    file.write(tmp_path / "x.h5", Content({}, {"schedule": Group(attributes)}))
    back = ScheduleState(**file.read(tmp_path / "x.h5").groups["schedule"].attributes)
    assert back == state
    assert follow(rule, seen[stop + 1 :], back) == whole[stop + 1 :]


# Estimates that stop early


def test_an_estimate_stopped_above_the_threshold_never_grows_the_batch():
    rule = abs_(kappa=3)
    state = replace(rule.initial(), reference=8.0)
    assert rule.threshold(state) == 4.0
    stopped = Eigenvalue(5.5, 0.1, 1, 16, 0.0, converged=False, stopped_above_threshold=True)
    decision = rule.decide(state, Observation(1.0, True, stopped))
    assert (decision.action, decision.reason) == ("continue", "λ above 8/2 (at least 5.5)")
    assert decision.state == replace(state, patience_count=1)


@pytest.mark.parametrize(
    ("after", "reference", "patience_count", "threshold"),
    [
        ("reset", None, 0, None),
        ("reset", 8.0, 2, None),
        ("reset", 8.0, 1, 4.0),
        ("keep", None, 2, None),
        ("keep", 8.0, 2, 4.0),
    ],
)
def test_no_threshold_if_the_value_becomes_the_reference(
    after, reference, patience_count, threshold
):
    rule = abs_(kappa=3, reference_after_patience=after)
    state = replace(rule.initial(), reference=reference, patience_count=patience_count)
    assert rule.threshold(state) == threshold


def test_an_estimate_stopped_above_the_threshold_when_patience_ends():
    rule = abs_(kappa=2, reference_after_patience="keep")
    state = replace(rule.initial(), reference=8.0, patience_count=1)
    stopped = Eigenvalue(5.5, 0.1, 1, 16, 0.0, converged=False, stopped_above_threshold=True)
    decision = rule.decide(state, Observation(1.0, True, stopped))
    assert (decision.action, decision.cause) == ("grow", "patience")
    assert decision.reason == ("λ above 8/2 (at least 5.5); no growth for 2 decisions: batch 1 → 2")
    assert decision.state.reference == 8.0


# More estimates where a crossing is doubtful


def seen(value, error=None, bound=None, **fields):
    return replace(estimate(value), sampling_error=error, upper_bound=bound, **fields)


@pytest.mark.parametrize(
    ("reference", "eigenvalue", "estimates", "another"),
    [
        (None, seen(8.0, 0.1), 1, True),  # it becomes the reference
        (None, seen(8.0, 0.1), 3, False),  # no more than max_estimates
        (8.0, seen(3.9, 0.1), 1, True),
        (8.0, seen(3.9, 0.04), 1, False),  # below the threshold by more than two errors
        (8.0, seen(3.9, 0.04), 2, False),
        (8.0, seen(3.9, None), 1, True),  # an unknown error is doubtful
        (8.0, seen(3.9, math.nan), 1, True),
        (8.0, seen(4.1, 3.0), 1, False),  # no crossing that would need it
        (8.0, seen(3.9, 3.0), 3, False),
        (8.0, seen(3.9, 0.01, 4.2), 1, True),  # a stated upper bound decides
        (8.0, seen(3.9, 3.0, 3.95), 1, False),
        (8.0, seen(3.9, 3.0, converged=False), 1, False),
        (8.0, seen(-1.0, 3.0), 1, False),
        (8.0, seen(3.0, 3.0, stopped_above_threshold=True), 2, False),
    ],
)
def test_another_estimate_is_wanted_while_a_crossing_is_doubtful(
    reference, eigenvalue, estimates, another
):
    rule = abs_(max_estimates=3)
    state = replace(rule.initial(), reference=reference)
    assert rule.wants_another(state, eigenvalue, estimates) is another
    assert not abs_().wants_another(state, eigenvalue, 1), "by default there is one estimate"
