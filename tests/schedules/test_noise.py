"""GNS over scripted gradients, and its formulas against samples whose noise is known."""

import math
from dataclasses import asdict

import pytest
import torch

from hpc_absa.checkpoint import Content, Group, file
from hpc_absa.records import GradientSquares
from hpc_absa.schedules import GNS, NormTest
from hpc_absa.schedules.noise import NoiseState
from tests.schedules.tables import actions, at, batches, bound, follow, lrs


def gns(max_batch=64, base=8, microbatch=4, milestones=(), **keys):
    schedule = GNS(base_batch=base, max_batch=max_batch, **keys)
    return bound(schedule, microbatch=microbatch, milestones=milestones)


def step(scale, signal=1.0, M=2, b=4):
    """The expectation of a step's gradient squares at a noise scale."""
    noise = scale * signal
    return GradientSquares(M, signal + noise / b, signal + noise / (M * b))


def run(*scales):
    """Ends of epochs, and one step before each."""
    epochs = [at(epoch) for epoch in range(1, len(scales) + 1)]
    return epochs, [[step(scale)] for scale in scales]


NAN = math.nan


@pytest.mark.parametrize(
    ("scales", "wanted"),
    [
        ([15, 16, 31, 32, 64, 1000], "cgcggc"),
        ([1000, 1000, 1000, 1000], "gggc"),
        ([1, 1, 1], "ccc"),
        # Unusable: NaN, infinite, zero, negative
        ([NAN, math.inf, 0.0, -5.0, 16], "ccccg"),
    ],
)
def test_growth_once_the_noise_scale_reaches_the_next_batch(scales, wanted):
    boundaries, steps = run(*scales)
    assert actions(follow(gns(), boundaries, steps=steps)) == wanted


def test_a_signal_that_is_not_positive_is_ignored():
    steps = [[step(100, signal=-1.0)], [step(100, signal=0.0)], [GradientSquares(2, NAN, 1.0)]]
    decisions = follow(gns(), [at(e) for e in (1, 2, 3)], steps=steps)
    assert actions(decisions) == "ccc"
    assert all("not finite" in decision.reason for decision in decisions)


def test_moments_are_averaged_before_the_quotient_is_taken():
    """By the mean of quotients (1 and 61) this would grow; the quotient of means is 5."""
    steps = [[step(1, signal=1.4), step(61, signal=0.1)]]
    (decision,) = follow(gns(), [at(1)], steps=steps)
    assert decision.action == "continue"
    assert decision.reason == "16 > 1 × noise scale 5"


def test_the_sums_restart_at_decision_points_only():
    boundaries = [at(1, decision_point=False), at(2), at(3)]
    decisions = follow(gns(), boundaries, steps=[[step(31)], [step(1)], [step(16)]])
    assert [d.state.steps for d in decisions] == [1, 0, 0]
    assert actions(decisions) == "cgc"  # (31 + 1)/2 = 16, then 16 < 32


def test_gamma_is_how_many_noise_scales_the_batch_may_reach():
    boundaries, steps = run(8, 16)
    assert batches(follow(gns(gamma=2), boundaries, steps=steps)) == [16, 32]


@pytest.mark.parametrize(
    ("lr_rule", "factor"), [("none", 1), ("square-root", 2**0.5), ("linear", 2)]
)
def test_the_learning_rate_follows_the_batch_and_the_last_growth_is_cut(lr_rule, factor):
    boundaries, steps = run(99, 99)
    decisions = follow(gns(max_batch=20, lr_rule=lr_rule), boundaries, steps=steps)
    assert batches(decisions) == [16, 20]
    assert lrs(decisions)[0] == pytest.approx(0.1 * factor)


def test_a_milestone_and_growth_at_the_same_boundary():
    boundaries, steps = run(1, 99)
    decision = follow(gns(milestones=(2,)), boundaries, steps=steps)[-1]
    assert decision.action == "grow"
    assert decision.state.lr == pytest.approx(0.1 * 0.1 * 2)
    assert decision.reason.startswith("16 ≤ 1 × noise scale 99: batch 8 → 16; milestone at epoch 2")


def test_steps_of_one_microbatch_are_ignored():
    steps = [[GradientSquares(1, 5.0, 5.0)]]
    (decision,) = follow(gns(), [at(1)], steps=steps)
    assert decision.reason == "no step of two microbatches or more: no growth"


def test_no_gradients_are_wanted_at_the_maximum():
    rule = gns(max_batch=8)
    assert not rule.wants_gradients(rule.initial())
    assert not rule.wants_eigenvalue(rule.initial())
    assert follow(rule, [at(1)])[0].reason == "batch is at its maximum 8"


def test_the_evidence_has_the_noise_scale_and_both_moments():
    rule = gns()
    assert rule.evidence(rule.initial()) == {}
    state = rule.learn(rule.learn(rule.initial(), step(6)), step(10))
    assert rule.evidence(state) == pytest.approx(
        {"noise_scale": 8, "gradient_noise": 8, "gradient_signal": 1}
    )


@pytest.mark.parametrize("scale", [10, 16, 40, NAN, -1])
def test_a_decision_is_derived_again_from_its_event(scale):
    """Events have null for what is not finite."""
    rule = gns()
    state = rule.learn(rule.learn(rule.initial(), step(scale)), step(scale))
    event = {k: v if math.isfinite(v) else None for k, v in rule.evidence(state).items()}
    again = rule.recall(rule.initial(), {"epoch": 1, **event})
    assert rule.decide(again, at(1)) == rule.decide(state, at(1))


def test_recall_without_measurements():
    rule = gns()
    assert rule.recall(rule.initial(), {"epoch": 1}) == rule.initial()


@pytest.mark.parametrize("stop", range(5))
def test_a_resume_in_between_decides_the_same(tmp_path, stop):
    """Stopped between two decision points; the state is saved as a checkpoint's attributes."""
    boundaries, steps = run(10, 20, NAN, 40, 70)
    steps = [[*some, step(18)] for some in steps]
    rule = gns(milestones=(3,))
    whole = follow(rule, boundaries, steps=steps)
    before = whole[stop - 1].state if stop else rule.initial()
    state = rule.learn(before, steps[stop][0])
    group = Group({key: value for key, value in asdict(state).items() if value is not None})
    file.write(tmp_path / "x.h5", Content({}, {"schedule": group}))
    back = NoiseState(**file.read(tmp_path / "x.h5").groups["schedule"].attributes)
    rest = [steps[stop][1:], *steps[stop + 1 :]]
    assert follow(rule, boundaries[stop:], back, rest) == whole[stop:]


def test_the_moments_are_those_of_the_samples():
    """Gradients drawn with mean G and covariance σ²·1 in 50 dimensions: tr Σ = 50 σ²."""
    torch.manual_seed(0)
    b, M, dimensions, sigma = 8, 4, 50, 0.7
    rule = gns(max_batch=10**6, base=M * b, microbatch=b)
    G = torch.randn(dimensions, dtype=torch.float64)
    state = rule.initial()
    for _ in range(2000):
        samples = G + sigma * torch.randn(M, b, dimensions, dtype=torch.float64)
        each = samples.mean(dim=1)
        squares = GradientSquares(
            M, float(each.square().sum(dim=1).mean()), float(each.mean(dim=0).square().sum())
        )
        state = rule.learn(state, squares)
    event = rule.evidence(state)
    assert event["gradient_noise"] == pytest.approx(dimensions * sigma**2, rel=0.02)
    assert event["gradient_signal"] == pytest.approx(float(G.square().sum()), rel=0.02)


# Norm test


def norm_test(max_batch=1024, base=8, microbatch=4, **keys):
    return bound(NormTest(base_batch=base, max_batch=max_batch, **keys), microbatch=microbatch)


@pytest.mark.parametrize(
    ("scale", "eta", "batch"),
    [
        # tr Σ/B ≤ η²·(‖G‖² + tr Σ/B) at B = 8: T = tr Σ/(η²·(1 + tr Σ/8))
        (1.0, 0.5, 8),  # 1/8 ≤ 0.25·9/8
        (8 / 3, 0.5, 8),  # equality: 1/3 = 0.25·4/3
        (2.7, 0.5, 12),  # 8.07 is rounded up to whole microbatches
        (8.0, 0.5, 16),  # 8/(0.25·2)
        (8.0, 0.25, 64),
        (1e12, 0.5, 32),  # all noise: B/η²
        (1e12, 0.1, 800),
        (1e12, 0.01, 1024),  # the maximum
        (0.0, 0.5, 8),
        (-4.0, 0.5, 8),
    ],
)
def test_the_norm_test_grows_to_the_batch_that_passes(scale, eta, batch):
    (decision,) = follow(norm_test(eta=eta), [at(1)], steps=[[step(scale)]])
    assert decision.state.global_batch == batch
    assert decision.state.lr == 0.1


def test_the_batch_that_the_norm_test_chose_passes_it():
    rule = norm_test(eta=0.5)
    steps = [[step(8.0)], [step(8.0, M=4)], [step(8.0, M=4)]]
    decisions = follow(rule, [at(1), at(2), at(3)], steps=steps)
    # 8/16 ≤ 0.25·(1 + 8/16) fails once more: the gradient of a larger batch is smaller.
    assert batches(decisions) == [16, 24, 24]
    assert decisions[-1].reason == "noise 0.5 of the gradient, η 0.5"


@pytest.mark.parametrize("scale", [NAN, math.inf])
def test_moments_that_the_norm_test_cannot_use(scale):
    (decision,) = follow(norm_test(), [at(1)], steps=[[step(scale)]])
    assert decision.action == "continue"
    assert "not finite or not positive" in decision.reason


def test_a_decision_of_the_norm_test_is_derived_again_from_its_event():
    rule = norm_test()
    state = rule.learn(rule.learn(rule.initial(), step(20)), step(30))
    again = rule.recall(rule.initial(), {"epoch": 1, **rule.evidence(state)})
    assert (
        rule.decide(again, at(1)).state.global_batch == rule.decide(state, at(1)).state.global_batch
    )


def test_the_norm_test_is_the_fraction_of_batches_with_a_wrong_direction():
    """Gradients drawn with known moments: the ratio in the reason is that of the definition."""
    torch.manual_seed(0)
    b, M, dimensions, sigma = 8, 4, 50, 0.7
    rule = norm_test(max_batch=10**6, base=M * b, microbatch=b, eta=0.99)
    G = torch.full((dimensions,), 0.2, dtype=torch.float64)
    state, noise, squared = rule.initial(), 0.0, 0.0
    for _ in range(1000):
        samples = G + sigma * torch.randn(M, b, dimensions, dtype=torch.float64)
        mean = samples.mean(dim=(0, 1))
        each = float(samples.mean(dim=1).square().sum(dim=1).mean())
        state = rule.learn(state, GradientSquares(M, each, float(mean.square().sum())))
        flat = samples.reshape(-1, dimensions)
        noise += float(flat.var(dim=0).sum()) / len(flat)  # the paper's estimate of the variance
        squared += float(mean.square().sum())
    ratio = float(rule.decide(state, at(1)).reason.split()[1])
    assert ratio == pytest.approx(math.sqrt(noise / squared), rel=0.02)
