"""The planner: published counts, and the same steps as a slow simulation of each one."""

import math
import time
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hpc_absa import config
from hpc_absa.errors import UsageError
from hpc_absa.plan import plan, stream_of, training_samples
from hpc_absa.records import Decision, Eigenvalue, GradientSquares, Observation, ScheduleState
from hpc_absa.report.published import PUBLISHED_ACCURACY
from hpc_absa.schedules import Rule, build
from hpc_absa.study import sweep
from tests import job_files
from tests.job_files import JOB_FILES, SWEEP_FILES

JOB = """
[data]
name = "cifar10"
[model]
name = "resnet18"
[train]
epochs = 90
microbatch = 128
lr = 0.1
milestones = [30, 60, 80]
[schedule]
method = "bl"
base_batch = 128
"""


def job(*overrides):
    return config.parse("name = 'a'\n" + JOB, "test", overrides)


def plan_of(*overrides, samples=50_000, limit=64):
    return plan(job(*overrides), samples, limit)["plan"]


def phases(planned):
    return [(phase.steps, phase.global_batch) for phase in planned.phases]


# The talk's tables


@pytest.mark.parametrize("method", ["bl", "fb"])
@pytest.mark.parametrize(
    ("batch", "steps"),
    [(128, 35156), (640, 7031), (3200, 1406), (5120, 878), (10240, 439), (16000, 281)],
)
def test_constant_batches_have_the_steps_of_the_talk(method, batch, steps):
    assert plan_of(f"schedule.method={method}", f"schedule.max_batch={batch}").steps == steps


@pytest.mark.parametrize(
    ("batch", "steps"),
    [(640, 16380), (3200, 14508), (5120, 14449), (10240, 14400), (16000, 14383)],
)
def test_gg_has_the_steps_of_the_talk(batch, steps):
    planned = plan_of("schedule.method=gg", f"schedule.max_batch={batch}", "train.drop_last=true")
    assert planned.steps == steps


@pytest.mark.parametrize(("method", "largest", "thousands"), [("bl", 256, 450), ("gg", 2**20, 166)])
def test_imagenet_has_the_steps_of_the_talk(method, largest, thousands):
    planned = plan_of(
        f"schedule.method={method}",
        "train.microbatch=256",
        "schedule.base_batch=256",
        f"schedule.max_batch={largest}",
        "train.lr_decay=0.1",
        samples=1_281_167,
    )
    assert round(planned.steps / 1000) == thousands


@pytest.mark.parametrize("method", ["abs", "absa"])
@pytest.mark.parametrize("batch", [640, 3200, 5120, 10240, 16000])
def test_the_talks_measurements_lie_between_the_earliest_and_the_latest_plan(method, batch):
    overrides = (f"schedule.method={method}", f"schedule.max_batch={batch}")
    plans = plan(job(*overrides), 50_000, 64)
    _, measured = PUBLISHED_ACCURACY[batch][method]
    assert plans["earliest"].steps <= measured <= plans["latest"].steps


# Phases


def test_milestones_separate_phases():
    planned = plan_of()
    assert [round(p.lr, 6) for p in planned.phases] == [0.1, 0.02, 0.004, 0.0008]
    assert [round(p.epochs) for p in planned.phases] == [30, 30, 20, 10]
    assert sum(p.steps for p in planned.phases) == planned.steps


def test_a_phase_with_warm_up_has_the_learning_rate_after_it():
    planned = plan_of("schedule.method=fb", "schedule.max_batch=1280")
    assert planned.phases[0].lr == pytest.approx(1.0)


def test_gg_decays_the_learning_rate_by_the_rest_of_the_factor():
    planned = plan_of("schedule.method=gg", "schedule.max_batch=1280", "ranks.max=10", limit=10)
    assert [p.global_batch for p in planned.phases] == [128, 640, 1280, 1280]
    assert [p.ranks for p in planned.phases] == [1, 5, 10, 10]
    assert [p.lr for p in planned.phases] == pytest.approx([0.1, 0.1, 0.04, 0.008])


def test_earliest_grows_at_every_decision_after_the_first():
    for alpha in (1.01, 2, 3, 8):
        plans = plan(
            job("schedule.method=abs", "schedule.max_batch=1024", f"schedule.alpha={alpha}"),
            50_000,
            8,
        )
        grown = plans["earliest"].phases[:4]
        assert [p.global_batch for p in grown] == [128, 256, 512, 1024]
        assert [round(p.epochs) for p in grown] == [2, 1, 1, 26]


def test_latest_grows_after_kappa_decisions():
    plans = plan(
        job("schedule.method=absa", "schedule.max_batch=512", "train.milestones=[]"), 50_000, 8
    )
    latest = plans["latest"].phases
    assert [p.global_batch for p in latest] == [128, 256, 512]
    assert [round(p.epochs) for p in latest] == [10, 10, 70]


def test_absa_tuned_decides_less_often_before_the_first_growth():
    tuned = job("schedule.method=absa-tuned", "schedule.max_batch=1024", "train.milestones=[]")
    plans = plan(tuned, 50_000, 8)
    assert [round(p.epochs) for p in plans["earliest"].phases] == [2, 1, 1, 86]
    assert [round(p.epochs) for p in plans["latest"].phases] == [5, 5, 5, 75]


def test_gns_grows_at_every_decision_or_never():
    overrides = ("schedule.method=gns", "schedule.base_batch=256", "schedule.max_batch=1024")
    plans = plan(job(*overrides, "train.milestones=[]"), 50_000, 8)
    assert [round(p.epochs) for p in plans["earliest"].phases] == [1, 1, 88]
    assert [p.global_batch for p in plans["latest"].phases] == [256]


@pytest.mark.parametrize("method", ["bl", "fb", "abs", "absa"])
def test_neither_cosine_nor_warm_up_separates_phases(method):
    overrides = (f"schedule.method={method}", "train.milestones=[]", "train.annealing='cosine'")
    for planned in plan(job(*overrides, "schedule.warmup_epochs=3"), 50_000, 8).values():
        (phase,) = planned.phases
        assert (phase.lr, planned.steps) == (0.1, 35156)


def test_there_is_no_growth_at_the_end_of_the_run():
    """A growth due with the last sample has no step to act on, and no step is cut for it."""
    settings = ("schedule.method=abs", "schedule.kappa=2", "train.epochs=4", "train.milestones=[]")
    sizes = ("train.microbatch=10", "schedule.base_batch=30", "schedule.max_batch=120")
    latest = plan(job(*settings, *sizes), 100, 8)["latest"]
    # Two epochs of 20 microbatches by threes with the last step cut, then 20 by sixes: 7 + 3.
    assert latest.steps == 10
    assert phases(latest) == [(7, 30), (3, 60)]


def test_estimates_are_counted_where_the_schedule_wants_them():
    """At every decision point before the largest batch; absa-tuned less often at first."""
    overrides = ("schedule.max_batch=512", "train.milestones=[]")
    for method, latest in (("abs", [10, 10, 0]), ("absa-tuned", [4, 5, 0])):
        plans = plan(job(f"schedule.method={method}", *overrides), 50_000, 8)
        assert [phase.estimates for phase in plans["earliest"].phases] == [2, 1, 0]
        assert [phase.estimates for phase in plans["latest"].phases] == latest
    assert {phase.estimates for phase in plan_of("schedule.method=gg", *overrides[:1]).phases} == {
        0
    }


def test_the_number_of_ranks_never_falls():
    overrides = ("schedule.method=abs", "schedule.base_batch=512", "schedule.max_batch=640")
    for planned in plan(job(*overrides), 50_000, 4).values():
        assert {p.ranks for p in planned.phases} == {4}


@pytest.mark.parametrize(
    ("name", "samples"), [("digits", 1437), ("cifar10", 50_000), ("imagenet", 1_281_167)]
)
def test_known_data_sets_need_no_files(name, samples):
    assert training_samples(job(f"data.name={name}")) == samples


def test_the_size_of_digits_is_that_of_scikit_learn(tmp_path):
    from hpc_absa.data.prepare import prepare

    dataset = prepare("digits", None, {}, tmp_path / "digits.h5")
    assert len(dataset.train.labels) == training_samples(job("data.name=digits"))


def test_a_user_defined_data_set_needs_its_size():
    with pytest.raises(UsageError, match=r"data\.name = 'my\.own:data': .* --samples N"):
        training_samples(job("data.name=my.own:data"))


def test_a_part_of_the_training_set():
    own = job("data.name=my.own:data", "data.train_samples=100")
    assert training_samples(own, 1000) == 100
    assert training_samples(own, 50) == 50


# Long runs

LONG = pytest.mark.parametrize("epochs", ["1e6", "1000000000"])


@LONG
@pytest.mark.parametrize(
    "overrides",
    [
        ("schedule.method=bl",),
        ("schedule.method=gg", "schedule.max_batch=1024"),
        ("schedule.method=abs", "schedule.max_batch=1024"),
        ("schedule.method=absa", "schedule.max_batch=1024", "schedule.kappa=5000000"),
        ("schedule.method=absa-tuned", "schedule.max_batch=640", "hessian.every=12345"),
        ("schedule.method=gns", "schedule.base_batch=256", "schedule.max_batch=1024"),
    ],
    ids=lambda overrides: overrides[0].partition("=")[2],
)
def test_a_run_until_the_time_limit_is_planned_in_a_moment(overrides, epochs):
    """All phases but the last are those of a shorter run, and the last has all other steps."""
    began = time.process_time()
    plans = plan(job(*overrides, f"train.epochs={epochs}"), 50_000, 8)
    assert time.process_time() - began < 0.5
    for name, shorter in plan(job(*overrides, "train.epochs=500"), 50_000, 8).items():
        assert plans[name].phases[: len(shorter.phases) - 1] == shorter.phases[:-1]
        microbatches = sum(p.steps * p.global_batch // 128 for p in plans[name].phases)
        cut = 8 * len(plans[name].phases)
        assert abs(microbatches - int(float(epochs)) * 50_000 // 128) < cut


class Doubling(Rule):
    """Doubles the batch once, at epoch 700,000; `known` whether the planner is informed of it."""

    def __init__(self, base_batch, known):
        self.start, self.known = ScheduleState(base_batch, 0.1), known

    def initial(self):
        return self.start

    def decide(self, state, seen):
        if seen.epoch < 700_000 or state.global_batch > self.start.global_batch:
            return Decision("continue", "", state)
        return Decision("grow", "", replace(state, global_batch=2 * state.global_batch))

    def unchanged(self, state, epoch, growing):
        if not self.known:
            return super().unchanged(state, epoch, growing)
        return math.inf, 700_000 if state.global_batch == self.start.global_batch else math.inf


DOUBLING = ("schedule.method=tests.test_plan:Doubling", "train.epochs=1e6", "train.milestones=[]")


def test_a_user_defined_rule_can_make_its_long_runs_fast_to_plan():
    began = time.process_time()
    planned = plan_of(*DOUBLING, "schedule.known=true")
    assert time.process_time() - began < 0.5
    assert phases(planned)[0] == (700_000 * 50_000 // 128, 128)
    assert planned.phases[1].global_batch == 256


def test_a_user_defined_rule_that_does_not_is_refused_and_not_walked_for_ever(monkeypatch):
    monkeypatch.setattr("hpc_absa.plan.MAX_BOUNDARIES", 100)
    with pytest.raises(UsageError, match=r"more than 100 boundaries .* implement Rule\.unchanged"):
        plan_of(*DOUBLING, "schedule.known=false")


# Against a simulation


def simulate(of, samples, grows):
    """Steps and batches as (steps, batch) runs, one microbatch at a time in exact fractions."""
    train, rule, estimate = of.train, build(of), value(of, grows)
    b, N, E = train.microbatch, samples, train.epochs
    per_epoch = Fraction(N // b) if train.drop_last else Fraction(N, b)
    total = int(per_epoch * E)
    every = of.hessian.every or N
    marks = dict.fromkeys(range(every, E * N + 1, every), True)
    marks |= {e * N: e * N in marks for e in range(1, E + 1)}
    waiting = sorted(marks.items())
    at, state, steps, estimates = 0, rule.initial(), [], 0
    while waiting:
        size = state.global_batch // b
        visited, decides = waiting[0]
        place = next((k for k in range(at, total) if k >= Fraction(visited, N) * per_epoch), total)
        if place >= at + size:
            steps.append((state.global_batch, rule.lr(state, at * b / N), size))
            at += size
            continue
        waiting.pop(0)
        if not waiting:
            break
        if decides and rule.wants_gradients(state):
            noise = 1e9 if grows else 0.0  # of one sample's gradient, in squared gradients
            state = rule.learn(state, GradientSquares(2, 1 + noise / b, 1 + noise / (2 * b)))
        asked = decides and rule.wants_eigenvalue(state)
        estimates += asked
        seen = Observation(visited / N, decides, estimate(state) if asked else None)
        decision = rule.decide(state, seen)
        if decision.action == "grow" and at < place:
            steps.append((state.global_batch, rule.lr(state, at * b / N), place - at))
            at = place
        state = decision.state
    return steps, at, estimates


def value(of, falls):
    def estimate(state):
        factor = getattr(of.schedule, "alpha", 1.0) if falls else 1.0
        number = (state.reference or 1.0) / (factor if state.reference else 1.0)
        return Eigenvalue(number, 0.0, 1, 1, 0.0, converged=True)

    return estimate


METHODS = (
    "bl", "fb", "gg", "abs", "absa", "absa-tuned", "gns", "norm-test", "seesaw", "steps", "random"
)  # fmt: skip


@st.composite
def tasks(draw):
    method = draw(st.sampled_from(METHODS))
    b = draw(st.integers(1, 8))
    samples = draw(st.integers(b, 90))
    base = b * draw(st.integers(2 if method in ("gns", "norm-test") else 1, 4))
    epochs = draw(st.integers(1, 6))
    milestones = sorted(draw(st.sets(st.integers(1, epochs + 1), max_size=3)))
    overrides = [
        f"schedule.method={method}",
        f"train.microbatch={b}",
        f"train.epochs={epochs}",
        f"train.milestones={milestones}",
        f"train.lr_decay={draw(st.sampled_from([0.1, 0.2, 0.5, 1.0]))}",
        f"train.drop_last={draw(st.sampled_from(['false', 'true']))}",
        f"schedule.base_batch={base}",
        f"schedule.max_batch={base + b * draw(st.integers(0, 20))}",
    ]
    if draw(st.booleans()):
        overrides.append(f"hessian.every={draw(st.integers(3, 200))}")
    if method == "random":
        overrides.append(f"schedule.rate={draw(st.sampled_from([0.1, 0.5, 1.0]))}")
    if method == "steps":
        first, second = sorted(draw(st.sets(st.integers(1, 5), min_size=2, max_size=2)))
        entries = f"{first}e:{2 * base} {second}e:{3 * base}"
        overrides.append(f'schedule.batches="{entries}"')
    if method == "seesaw" and draw(st.booleans()):
        overrides += ["train.annealing='cosine'", "train.milestones=[]", "train.lr_decay=0.5"]
    if method.startswith("abs"):
        overrides.append(f"schedule.kappa={draw(st.integers(1, 4))}")
        overrides.append(f"schedule.beta={draw(st.integers(2, 3))}")
        overrides.append(f"schedule.alpha={draw(st.sampled_from([1.5, 2.0, 5.0]))}")
    loaded = job(*overrides)
    first = build(loaded).initial().global_batch // b
    assume(first <= stream_of(loaded, samples).microbatches)
    return loaded, samples


@given(tasks())
@settings(max_examples=100)
def test_plans_are_equal_to_the_simulation(task):
    of, samples = task
    for name, planned in plan(of, samples, 4).items():
        steps, at, estimates = simulate(of, samples, name == "earliest")
        assert planned.steps == len(steps)
        batches = [
            batch for phase in planned.phases for batch in [phase.global_batch] * phase.steps
        ]
        assert batches == [batch for batch, _, _ in steps]
        if of.schedule.method != "fb":  # whose warm-up the plan leaves out
            rates = [phase.lr for phase in planned.phases for _ in range(phase.steps)]
            assert rates == [rate for _, rate, _ in steps]
        assert sum(size for _, _, size in steps) == at
        assert sum(p.estimates for p in planned.phases) == estimates
        assert sum(p.epochs for p in planned.phases) <= of.train.epochs + 1e-3


def test_estimates_after_the_last_step_are_counted():
    of = job(
        "train.microbatch=1", "train.epochs=2", "train.milestones=[]", "hessian.every=13",
        "schedule={method='abs', base_batch=2, max_batch=17, alpha=1.5, kappa=2}",
    )  # fmt: skip
    for name, planned in plan(of, 46, 4).items():
        estimates = simulate(of, 46, name == "earliest")[2]
        assert sum(p.estimates for p in planned.phases) == estimates


@given(tasks())
@settings(max_examples=100)
def test_the_earliest_plan_is_the_shortest(task):
    of, samples = task
    plans = plan(of, samples, 4)
    assume("earliest" in plans)
    # A growth in the middle of a step cuts it, and the pieces count as steps of their own.
    cuts = len(plans["earliest"].phases)
    assert plans["earliest"].steps <= plans["latest"].steps + cuts
    whole_epochs = of.train.drop_last and not samples % of.schedule.base_batch
    if whole_epochs and of.hessian.every is None and of.schedule.largest_batch <= samples:
        assert plans["earliest"].steps <= plans["latest"].steps


def planned_jobs():
    """Every job of the package, and those of its sweeps' cells."""
    yield from (pytest.param(config.load(path), id=job_files.name(path)) for path in JOB_FILES)
    for path in SWEEP_FILES:
        for cell in sweep.load(path)[1]:
            yield pytest.param(cell.job, id=f"{job_files.name(path)}:{cell.name}")


@pytest.mark.parametrize("loaded", list(planned_jobs()))
def test_every_job_of_the_package_can_be_planned(loaded):
    for planned in plan(loaded, training_samples(loaded), 8).values():
        assert planned.steps > 0
        assert planned.phases[-1].global_batch <= loaded.schedule.largest_batch
