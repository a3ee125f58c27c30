"""ABS and ABSA over scripted eigenvalues."""

import math
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_absa.checkpoint import Content, Group, file
from hpc_absa.records import Eigenvalue, Observation, ScheduleState
from hpc_absa.schedules.absa import AdaptiveBatch, Adversarial
from hpc_absa.schedules.rule import Growth, Milestones
from tests.schedules.tables import actions, at, batches, follow, found, rates, unconverged

FAR = 10**6


def abs_(
    largest=8, kappa=FAR, alpha=2.0, beta=2, milestones=(), adversarial=None, every=1, exponent=1.0
):
    growth = Growth(beta, largest, exponent)
    return AdaptiveBatch(
        1, 0.1, growth, alpha, kappa, Milestones(milestones, 0.1), every, adversarial
    )


def absa(largest=8, kappa=FAR, until=FAR, ratio=0.2, omega=2.0):
    return abs_(largest, kappa, adversarial=Adversarial(ratio, omega, until))


def course(*eigenvalues):
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
    assert actions(follow(abs_(), course(*eigenvalues))) == wanted


def test_batch_rate_reference_and_patience_after_growth():
    state = follow(abs_(beta=3, largest=27), course(9, 8, 4))[-1].state
    assert state == ScheduleState(3, pytest.approx(0.3), 0.0, reference=4.0, patience_count=0)


def test_the_last_growth_is_cut_to_the_maximum_with_its_rate():
    decisions = follow(abs_(largest=3), course(8, 4, 2))
    assert batches(decisions) == [1, 2, 3]
    assert rates(decisions) == pytest.approx([0.1, 0.2, 0.3])


def test_alpha_is_the_ratio_that_growth_needs():
    assert actions(follow(abs_(alpha=4), course(8, 4, 2))) == "ccg"


# Growth by patience


@pytest.mark.parametrize(("kappa", "wanted"), [(1, "gggc"), (2, "cgcgcgc"), (3, "ccgccg")])
def test_growth_after_so_many_decisions_without(kappa, wanted):
    assert actions(follow(abs_(kappa=kappa), course(*[8] * len(wanted)))) == wanted


def test_patience_starts_anew_after_growth_by_ratio():
    assert actions(follow(abs_(kappa=3), course(8, 4, 4, 4, 4))) == "cgccg"


def test_growth_by_patience_takes_the_new_eigenvalue_as_reference():
    state = follow(abs_(kappa=2), course(8, 100))[-1].state
    assert (state.global_batch, state.reference) == (2, 100.0)


def test_patience_says_why():
    assert (
        follow(abs_(kappa=2), course(8, 8))[-1].reason == "no growth for 2 decisions: batch 1 → 2"
    )


# Eigenvalues that are no evidence

DOUBTFUL = [
    found(-1.0),
    found(0.0),
    found(math.nan),
    found(math.inf),
    found(-math.inf),
    unconverged(0.1),
    unconverged(math.nan),
    None,
]


@pytest.mark.parametrize("doubtful", DOUBTFUL, ids=str)
def test_it_never_grows_by_ratio(doubtful):
    decisions = follow(abs_(), course(8, doubtful, doubtful, doubtful))
    assert actions(decisions) == "cccc"
    assert decisions[-1].state.reference == 8.0
    assert decisions[-1].reason.endswith(": no growth")


@pytest.mark.parametrize("doubtful", DOUBTFUL, ids=str)
def test_it_never_becomes_the_reference(doubtful):
    decisions = follow(abs_(), course(doubtful, 8, 4))
    assert actions(decisions) == "ccg"
    assert [d.state.reference for d in decisions] == [None, 8.0, 4.0]


@pytest.mark.parametrize("doubtful", DOUBTFUL, ids=str)
def test_patience_runs_on_and_the_old_reference_stays(doubtful):
    decisions = follow(abs_(kappa=3), course(8, doubtful, doubtful, 4))
    assert actions(decisions) == "ccgg"
    assert decisions[2].state.reference == 8.0
    assert "no growth for 3 decisions" in decisions[2].reason


def test_growth_by_patience_without_any_reference():
    decisions = follow(abs_(kappa=2), course(None, unconverged(5.0), 8, 4))
    assert actions(decisions) == "cgcg"
    assert decisions[1].state.reference is None


# Fewer estimates early on


@pytest.mark.parametrize(
    ("every", "kappa", "eigenvalues", "wanted", "asked"),
    [
        # The first estimate is the reference; up to the first growth every third one is made.
        (3, FAR, [8, 1, 4, 4, 2], "ccgcg", "1.111"),
        (3, FAR, [8, 1, 8, 1, 1, 8, 1, 1, 4], "ccccccccg", "1.1..1..1"),
        # An estimate that is no evidence is made again at once.
        (3, FAR, [None, 8, 1, 1, 1, 4], "ccgccc", "111111"),
        # Where patience ends, the next reference is estimated.
        (4, 3, [8, 1, 8, 4], "ccgg", "1.11"),
        (1, FAR, [8, 8, 8], "ccc", "111"),
    ],
)
def test_estimates_before_the_first_growth(every, kappa, eigenvalues, wanted, asked):
    rule = abs_(every=every, kappa=kappa)
    decisions = follow(rule, course(*eigenvalues))
    assert actions(decisions) == wanted
    states = [rule.initial(), *(d.state for d in decisions)]
    wants = ["1" if rule.wants_eigenvalue(state) else "." for state in states[:-1]]
    assert "".join(wants) == asked


def test_a_decision_without_an_estimate_says_so():
    decisions = follow(abs_(every=3), course(8, 1))
    assert decisions[1].reason == "λ was not estimated: no growth"


@pytest.mark.parametrize(("exponent", "factor"), [(0.0, 1), (0.5, 2**0.5), (1.0, 2)])
def test_the_rate_follows_the_batch_by_the_job_s_rule(exponent, factor):
    decisions = follow(abs_(exponent=exponent), course(8, 4, 2))
    assert rates(decisions) == pytest.approx([0.1, 0.1 * factor, 0.1 * factor**2])


# The maximum


def test_no_estimate_is_wanted_at_the_maximum():
    rule = abs_(largest=2)
    decisions = follow(rule, course(8, 4, 0.1, 0.01))
    wants = [rule.wants_eigenvalue(d.state) for d in decisions]
    assert wants == [True, False, False, False]
    assert actions(decisions) == "cgcc"
    assert decisions[-1].reason == "batch is at its maximum 2"


def test_without_room_to_grow_it_is_bl():
    rule = absa(largest=1)
    assert not rule.wants_eigenvalue(rule.initial())
    assert rule.initial().adversarial_fraction == 0.0
    assert actions(follow(rule, course(8, 4, 2))) == "ccc"


# Milestones


def test_a_milestone_and_growth_at_the_same_boundary():
    decision = follow(abs_(milestones=(2,)), course(8, 4))[-1]
    assert decision.action == "grow"
    assert decision.state.lr == pytest.approx(0.1 * 0.1 * 2)
    assert decision.state.milestones_passed == 1
    assert "λ 4 ≤ 8/2: batch 1 → 2; milestone at epoch 2" in decision.reason


def test_milestones_count_at_the_maximum_and_off_decision_points():
    boundaries = [at(1, 8), at(2, decision_point=False), at(2.5, 4), at(3, decision_point=False)]
    decisions = follow(abs_(largest=2, milestones=(2, 3)), boundaries)
    assert actions(decisions) == "ccgc"
    assert rates(decisions) == pytest.approx([0.1, 0.01, 0.02, 0.002])


def test_a_boundary_that_is_no_decision_point_costs_no_patience():
    boundaries = [at(e, 8, decision_point=e % 2 == 0) for e in range(1, 7)]
    decisions = follow(abs_(kappa=3), boundaries)
    assert actions(decisions) == "cccccg"
    assert [d.state.patience_count for d in decisions] == [0, 1, 1, 2, 2, 0]


# Adversarial examples


@pytest.mark.parametrize(
    ("rule", "fractions"),
    [
        (absa(largest=16), [0.2, 0.1, 0.05, 0.025]),
        (absa(largest=4), [0.2, 0.1, 0.0, 0.0]),
        (absa(largest=16, until=3), [0.2, 0.1, 0.0, 0.0]),
        (absa(largest=16, until=2.5), [0.2, 0.1, 0.0, 0.0]),
        (absa(largest=16, omega=1.0), [0.2] * 4),
        (absa(largest=16, ratio=0.0), [0.0] * 4),
        (abs_(largest=16), [0.0] * 4),
    ],
)
def test_the_share_of_adversarial_examples_fades(rule, fractions):
    decisions = follow(rule, course(8, 4, 2, 1))
    assert [d.state.adversarial_fraction for d in decisions] == pytest.approx(fractions)


def test_they_end_after_half_the_epochs_at_any_boundary():
    decisions = follow(absa(until=2), [at(1.5), at(2, decision_point=False)])
    assert [d.state.adversarial_fraction for d in decisions] == [0.2, 0.0]


@pytest.mark.parametrize(("epoch", "fraction"), [(0, 0.2), (2.49, 0.2), (2.5, 0), (3, 0)])
def test_they_end_after_half_the_epochs_in_the_middle_of_one(epoch, fraction):
    rule = absa(until=2.5)
    assert rule.adversarial_fraction(rule.initial(), epoch) == fraction


def test_before_the_first_step():
    assert absa().initial() == ScheduleState(1, 0.1, adversarial_fraction=0.2)


# Pure, and the same after a resume


EIGENVALUES = st.lists(
    st.one_of(
        st.floats(0.01, 100).map(found),
        st.sampled_from([*DOUBTFUL[:4], unconverged(0.01), None]),
    ),
    max_size=12,
)


@given(EIGENVALUES, st.integers(1, 4))
def test_limits_hold_whatever_is_found(eigenvalues, kappa):
    decisions = follow(absa(largest=12, kappa=kappa), course(*eigenvalues))
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
    """The state goes through a checkpoint's attributes."""
    boundaries = course(None, 8, 9, 4, unconverged(1.0), 3, 2, 0.9)
    rule = AdaptiveBatch(
        1, 0.1, Growth(2, 8), 2.0, 4, Milestones((3, 5), 0.2), 2, Adversarial(0.2, 3.0, 6.0)
    )
    whole = follow(rule, boundaries)
    state = whole[stop].state
    attributes = {key: value for key, value in asdict(state).items() if value is not None}
    file.write(tmp_path / "x.h5", Content({}, {"schedule": Group(attributes)}))
    back = ScheduleState(**file.read(tmp_path / "x.h5").groups["schedule"].attributes)
    assert back == state
    assert follow(rule, boundaries[stop + 1 :], back) == whole[stop + 1 :]


def test_a_settled_estimate_is_above_the_threshold_and_never_grows():
    rule = AdaptiveBatch(32, 0.1, Growth(2, 256), 2.0, 3, Milestones((), 0.2))
    state = replace(rule.initial(), reference=8.0)
    assert rule.threshold(state) == 4.0
    settled = Eigenvalue(5.5, 0.1, 1, 16, 0.0, converged=False, stopped_above_threshold=True)
    decision = rule.decide(state, Observation(1.0, True, settled))
    assert (decision.action, decision.reason) == ("continue", "λ above 8/2 (at least 5.5)")
    assert decision.state == replace(state, patience_count=1)


def test_where_the_value_will_be_a_reference_nothing_is_settled_early():
    rule = AdaptiveBatch(32, 0.1, Growth(2, 256), 2.0, 3, Milestones((), 0.2))
    assert rule.threshold(rule.initial()) is None
    assert rule.threshold(replace(rule.initial(), reference=8.0, patience_count=2)) is None
    assert rule.threshold(replace(rule.initial(), reference=8.0, patience_count=1)) == 4.0
