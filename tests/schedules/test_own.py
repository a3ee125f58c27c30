"""User-defined rules: loading, arguments, and checks of what they return."""

import sys
from dataclasses import dataclass, replace

import pytest

from hpc_absa import config
from hpc_absa.errors import UsageError
from hpc_absa.plan import plan
from hpc_absa.records import Decision, Eigenvalue, GradientSquares, Observation, ScheduleState
from hpc_absa.schedules import Rule, build
from tests.schedules.tables import at

JOB = """
name = "a"
data = { name = "digits" }
model = { name = "m" }
train = { epochs = 6, microbatch = 32, lr = 0.1, milestones = [4] }
[schedule]
method = "tests.schedules.test_own:Doubling"
base_batch = 64
max_batch = 256
"""


@dataclass(frozen=True)
class Counting(ScheduleState):
    seen: int = 0


class Doubling(Rule):
    """Doubles the batch every so many epochs."""

    def __init__(self, base_batch, max_batch, lr, milestones, every=2):
        self.base_batch, self.max_batch, self.base_lr = base_batch, max_batch, lr
        self.milestones, self.every = milestones, every

    def initial(self):
        return Counting(self.base_batch, self.base_lr)

    def decide(self, state, seen):
        state, _ = self.milestones.apply(replace(state, seen=state.seen + 1), seen)
        if state.seen % self.every or state.global_batch >= self.max_batch:
            return Decision("continue", "waiting", state)
        return Decision("grow", "time", replace(state, global_batch=2 * state.global_batch))


class Faulty(Rule):
    """Returns what its arguments choose."""

    def __init__(self, base_batch, lr, answer=None, lr_answer=None, start=None):
        self.state = ScheduleState(start or base_batch, lr)
        self.answer, self.lr_answer = answer, lr_answer

    def initial(self):
        return self.state

    def decide(self, state, seen):
        if self.answer == "raise":
            return 1 / 0
        return {
            "nothing": None,
            "finish": Decision("finish", "over", state),
            "odd": Decision("grow", "why", replace(state, global_batch=100)),
            "smaller": Decision("continue", "why", replace(state, global_batch=32)),
            "silent": Decision("continue", "why", replace(state, global_batch=128)),
            "lr": Decision("continue", "why", replace(state, lr=float("nan"))),
        }[self.answer]

    def lr(self, state, epoch):
        return self.lr_answer


class NoRule:
    pass


def rule(*overrides):
    return build(config.parse(JOB, "test", overrides))


def refusal(call):
    with pytest.raises(UsageError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_class_gets_the_parameters_it_has_and_the_other_keys():
    decide = rule("schedule.every=3").decide
    state = rule().initial()
    actions = []
    for epoch in range(1, 5):
        decision = decide(state, at(epoch))
        actions.append((decision.action, decision.state.global_batch, decision.state.lr))
        state = decision.state
    assert actions == [
        ("continue", 64, 0.1),
        ("continue", 64, 0.1),
        ("grow", 128, 0.1),
        ("continue", 128, pytest.approx(0.02)),
    ]


def test_the_planner_follows_it():
    planned = plan(config.parse(JOB, "test"), 640, 8)["plan"]
    assert [(p.global_batch, round(p.epochs), p.lr) for p in planned.phases] == [
        (64, 2, 0.1),
        (128, 2, 0.1),
        (256, 2, pytest.approx(0.02)),
    ]


def test_a_job_with_it_is_dumped_and_parsed():
    job = config.parse(JOB, "test", ("schedule.every=3",))
    assert job.schedule.arguments == {"every": 3}
    assert config.parse(config.dump(job), "dump") == job


def test_defaults_of_the_optional_methods():
    checked, state = rule(), rule().initial()
    assert not checked.wants_eigenvalue(state)
    assert checked.threshold(state) is None
    assert not checked.wants_gradients(state)
    assert checked.learn(state, GradientSquares(2, 1.0, 1.0)) == state
    assert checked.evidence(state) == {}
    assert checked.lr(state, 3.0) == 0.1
    assert checked.adversarial_fraction(state, 3.0) == 0.0


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["method=tests.schedules.test_own:Dubling"], 'has no "Dubling"; did you mean Doubling'),
        (["method=no.such:Rule"], 'schedule.method: no module "no"'),
        (["method=:Rule"], 'schedule.method: ":Rule" is not of the form'),
        (["evry=3"], "schedule.evry: tests.schedules.test_own:Doubling has no such argument; "),
        (["method=tests.schedules.test_own:NoRule"], "made NoRule, expected a subclass of hpc_ab"),
        (
            ["method=tests.schedules.test_own:Faulty", "start=48"],
            "initial returned global_batch = 48, expected a multiple of train.microbatch = 32",
        ),
    ],
)
def test_a_class_that_cannot_be_loaded_is_one_line(overrides, line):
    assert line in refusal(lambda: rule(*(f"schedule.{override}" for override in overrides)))


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        ("raise", "Faulty.decide failed: ZeroDivisionError: division by zero"),
        ("nothing", "Faulty.decide returned NoneType, expected a hpc_absa.records.Decision"),
        ("finish", "returned action 'finish', expected 'continue' or 'grow'"),
        ("odd", "returned global_batch = 100, expected a multiple of train.microbatch = 32"),
        ("smaller", "returned 'continue' with batch 64 → 32, expected 'grow' with a larger"),
        ("silent", "returned 'continue' with batch 64 → 128, expected 'grow' with a larger"),
        ("lr", "returned lr = nan, expected a finite number above 0"),
    ],
)
def test_a_wrong_decision_is_one_line(answer, line):
    checked = rule("schedule.method=tests.schedules.test_own:Faulty", f"schedule.answer={answer}")
    seen = Observation(1.0, True, Eigenvalue(1.0, 0.0, 1, 1, 0.0, converged=True))
    assert line in refusal(lambda: checked.decide(checked.initial(), seen))


@pytest.mark.parametrize("lr", ["nan", "-1.0", "'high'"])
def test_a_wrong_learning_rate_is_one_line(lr):
    checked = rule("schedule.method=tests.schedules.test_own:Faulty", f"schedule.lr_answer={lr}")
    line = refusal(lambda: checked.lr(checked.initial(), 0.0))
    assert "expected a finite learning rate, 0 or more" in line


def test_a_module_in_the_current_folder_is_imported(tmp_path, monkeypatch):
    (tmp_path / "mine_to_plan.py").write_text(
        "from hpc_absa.records import Decision, ScheduleState\n"
        "from hpc_absa.schedules import Rule\n"
        "class Still(Rule):\n"
        "    def initial(self): return ScheduleState(32, 0.5)\n"
        "    def decide(self, state, seen): return Decision('continue', 'still', state)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert rule("schedule.method=mine_to_plan:Still").initial().lr == 0.5
