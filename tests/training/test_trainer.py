"""The trainer of a job file in this process: events, growth, stops, resuming, and one step."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from hpc_absa import config
from hpc_absa.checkpoint import read
from hpc_absa.checkpoint.manager import saved_phase
from hpc_absa.comm import SerialCommunicator
from hpc_absa.data.loader import Microbatch
from hpc_absa.errors import CollectiveError, ExitStatus, UsageError
from hpc_absa.plan import plan
from hpc_absa.progress import Step
from hpc_absa.records import PhaseOutcome
from hpc_absa.report.history import load as load_history
from hpc_absa.rundir import RunDir
from hpc_absa.status import status
from hpc_absa.training.clock import Clock
from hpc_absa.training.reduction import OverlappedReduction
from hpc_absa.training.step import StepEngine
from hpc_absa.training.sums import Flags
from hpc_absa.training.trainer import Adversary, Trainer
from tests.training import runs
from tests.training.runs import SAMPLES, Stop, events, state_bits


@pytest.fixture(autouse=True, scope="module")
def _threads():
    """A trainer sets the number of threads of the process."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder and the final state of a run without a stop."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = runs.trainer(folder)
    assert trainer.train() == PhaseOutcome("done", 1, 3)
    return folder, state_bits(trainer.run.state)


def test_events_of_a_run_that_grows_on_the_same_ranks(uninterrupted):
    boundary = ["epoch", "decision", "checkpoint"]
    growth = [*boundary, "phase_end", "phase_start"]
    folder, _ = uninterrupted
    assert runs.kinds(folder) == [
        "phase_start", *growth, *growth, *boundary, *boundary, "phase_end", "done"
    ]  # fmt: skip
    decisions = events(folder, "decision")
    assert [e["action"] for e in decisions] == ["grow", "grow", "continue", "finish"]
    assert [(e["batch"], e["next_batch"]) for e in decisions] == [
        (16, 32), (32, 64), (64, 64), (64, 64)
    ]  # fmt: skip
    assert [e["eigenvalue"] is None for e in decisions] == [False, False, True, True]
    starts, ends = events(folder, "phase_start"), events(folder, "phase_end")
    assert [(e["phase"], e["global_batch"]) for e in starts] == [(1, 16), (2, 32), (3, 64)]
    assert [(e["phase"], e["outcome"]) for e in ends] == [
        (1, "in_place"), (2, "in_place"), (3, "done")
    ]  # fmt: skip
    assert [e["steps"] for e in ends] == [9 + 1, 4 + 1, 4]
    assert [e["samples"] for e in ends] == [19 * 8, 37 * 8, 69 * 8]
    assert [e["epoch"] for e in events(folder, "epoch")] == [1, 2, 3, 4]


def test_a_cut_step_is_divided_by_the_microbatches_of_a_full_one(tmp_path):
    trainer, steps = runs.trainer(tmp_path), []
    begin = trainer.run.engine.begin

    def record(step, **arguments):
        steps.append((step.start, len(step.microbatches), arguments["divisor"]))
        return begin(step, **arguments)

    trainer.run.engine.begin = record
    trainer.train()
    first = [(start, 2, 2) for start in range(0, 18, 2)] + [(18, 1, 2)]
    second = [(start, 4, 4) for start in range(19, 35, 4)] + [(35, 2, 4)]
    assert steps == first + second + [(start, 8, 8) for start in range(37, 69, 8)]


def test_a_growth_that_wants_more_ranks_ends_the_phase(tmp_path):
    assert runs.train(tmp_path, "ranks.max=3") == PhaseOutcome("resize", 2, 2)
    run = RunDir(tmp_path)
    newest = run.checkpoint_files()[-1]
    assert newest == run.checkpoint(10, 2)
    attributes = read(newest).attributes
    assert (attributes["next_ranks"], attributes["rank_limit"]) == (2, 3)
    assert (attributes["global_batch"], attributes["world_size"]) == (32, 1)
    saved = saved_phase(run.checkpoints)
    assert (saved.next_ranks, saved.rank_limit, saved.global_batch) == (2, 3, 32)
    (decision,) = events(tmp_path, "decision")
    assert (decision["ranks"], decision["next_ranks"]) == (1, 2)
    assert decision["reason"].endswith(", ranks 1 → 2")
    (end,) = events(tmp_path, "phase_end")
    assert (end["outcome"], end["phase"], end["next_ranks"]) == ("resize", 1, 2)
    assert runs.kinds(tmp_path)[-2:] == ["checkpoint", "phase_end"]


def test_the_first_step_after_a_resize_logs_how_long_it_took(tmp_path):
    runs.train(tmp_path, "ranks.max=3")
    # one rank continues where two were wanted, as after a lost host
    assert runs.train(tmp_path, "ranks.max=3").kind == "resize"
    (resize,) = events(tmp_path, "resize")
    assert (resize["from_ranks"], resize["to_ranks"], resize["phase"]) == (1, 1, 2)


# Interruptions


def stop_in_the_middle_of_an_epoch(trainer, stop):
    before_microbatch(trainer, 25, lambda: setattr(stop, "now", True))


def stop_during_an_estimate(trainer, stop):
    stop.during_estimate = True


def stop_at_the_cut_step(trainer, stop):
    cut_step = trainer.run.cut_step

    def stop_before_it(boundary, decision):
        step = cut_step(boundary, decision)
        stop.now |= step is not None
        return step

    trainer.run.cut_step = stop_before_it


def before_microbatch(trainer, index, action):
    get = trainer.loader.get

    def get_after_action(k, then=()):
        if k == index:
            action()
        return get(k, then)

    trainer.loader.get = get_after_action


INTERRUPTIONS = {  # with the samples, the phase and the epochs evaluated at the stop
    stop_in_the_middle_of_an_epoch: (31 * 8, 2, 1),
    stop_during_an_estimate: (18 * 8, 1, 1),
    stop_at_the_cut_step: (19 * 8, 2, 1),
}


@pytest.mark.parametrize("interrupt", INTERRUPTIONS)
def test_a_run_that_was_stopped_and_resumed_is_the_uninterrupted_one(
    tmp_path, uninterrupted, interrupt
):
    stop = Stop()
    trainer = runs.trainer(tmp_path, stop=stop)
    interrupt(trainer, stop)
    samples, phase, epochs = INTERRUPTIONS[interrupt]
    assert trainer.train() == PhaseOutcome("stopped", 1, phase)
    end = events(tmp_path, "phase_end")[-1]
    assert (end["outcome"], end["phase"], end["samples"]) == ("stopped", phase, samples)
    assert len(events(tmp_path, "epoch")) == epochs
    resumed = runs.trainer(tmp_path)
    assert resumed.run.samples == samples
    assert resumed.train() == PhaseOutcome("done", 1, 3)
    assert_same_run(resumed, tmp_path, uninterrupted)


def test_a_run_that_is_stopped_again_and_again_is_the_uninterrupted_one(tmp_path, uninterrupted):
    outcome, stops = None, 0
    while outcome != PhaseOutcome("done", 1, 3):
        stop = Stop(during_estimate=stops % 2 == 1)
        trainer = runs.trainer(tmp_path, stop=stop)
        here = trainer.run.state.progress.position.microbatch
        before_microbatch(trainer, here + 8, lambda stop=stop: setattr(stop, "now", True))
        outcome = trainer.train()
        stops += 1
    assert stops >= 6
    assert_same_run(trainer, tmp_path, uninterrupted)


def crash(*arguments):
    raise RuntimeError("on purpose")


def crash_in_a_step(trainer):
    before_microbatch(trainer, 33, crash)


def crash_between_evaluation_and_decision(trainer):
    decide = trainer.run.decide
    trainer.run.decide = lambda b, estimate: crash() if b.epoch == 2 else decide(b, estimate)


@pytest.mark.parametrize("cause", [crash_in_a_step, crash_between_evaluation_and_decision])
def test_a_run_that_crashed_between_checkpoints_repeats_its_steps(tmp_path, uninterrupted, cause):
    trainer = runs.trainer(tmp_path)
    cause(trainer)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    assert len(events(tmp_path, "epoch")) == 1, "the second one is not in a checkpoint"
    resumed = runs.trainer(tmp_path)
    assert resumed.run.samples == 19 * 8
    assert resumed.train().kind == "done"
    assert_same_run(resumed, tmp_path, uninterrupted)


def assert_same_run(trainer, folder, uninterrupted):
    """The same bits, and each epoch event and decision once."""
    reference, bits = uninterrupted
    assert state_bits(trainer.run.state) == bits
    for kind in ("epoch", "decision", "done"):
        assert events(folder, kind) == events(reference, kind), kind


def test_a_stop_with_a_growth_to_more_ranks_leaves_the_resize_to_the_next_start(tmp_path):
    stop = Stop()
    trainer = runs.trainer(tmp_path, "ranks.max=4", stop=stop)
    stop_at_the_cut_step(trainer, stop)
    assert trainer.train() == PhaseOutcome("resize", 4, 2)
    assert saved_phase(RunDir(tmp_path).checkpoints).next_ranks == 4


def test_a_run_is_continued_with_another_learning_rate(tmp_path):
    """The batch, and with it the learning rate, has doubled before."""
    runs.train_until(tmp_path, microbatch=30)
    assert runs.trainer(tmp_path).run.lr == pytest.approx(0.04)
    other = runs.trainer(tmp_path, "train.lr=0.01", allow_changed=("train.lr",))
    assert other.run.lr == pytest.approx(0.02)


def test_a_run_is_continued_with_other_decision_points(tmp_path):
    runs.train_until(tmp_path, microbatch=30)
    run = runs.trainer(tmp_path, "hessian.every=37", allow_changed=("hessian.every",)).run
    position = run.state.progress.position
    behind, ahead = (run.stream.boundary(position.boundary + i).microbatch for i in (-1, 0))
    assert behind <= position.microbatch <= ahead


def test_a_finished_run_takes_no_step_when_it_is_resumed(tmp_path):
    assert runs.train(tmp_path, "train.epochs=1").kind == "done"
    before, files = events(tmp_path), RunDir(tmp_path).checkpoint_files()
    trainer = runs.trainer(tmp_path, "train.epochs=1")
    bits = state_bits(trainer.run.state)
    trainer.train_step = None
    assert trainer.train().kind == "done"
    assert state_bits(trainer.run.state) == bits
    added = events(tmp_path)[len(before) :]
    assert [e["event"] for e in added] == ["phase_start", "phase_end", "done"]
    assert (added[1]["steps"], added[2]) == (0, before[-1])
    assert RunDir(tmp_path).checkpoint_files() == files


# Checkpoints


def test_a_save_is_due_when_the_last_one_is_old_enough(tmp_path, uninterrupted):
    seldom = [e["step"] for e in events(uninterrupted[0], "checkpoint")]
    assert seldom == [10, 15, 17, 19]
    trainer = runs.trainer(tmp_path, "checkpoint.every_seconds=1e-9", "train.epochs=1")
    trainer.train()
    # after every step; again at the boundary, whose decision is saved with it
    assert [e["step"] for e in events(tmp_path, "checkpoint")] == [*range(1, 10), 9]


def test_an_epoch_without_a_step_has_no_training_loss(tmp_path):
    runs.train(tmp_path, f"schedule={{method = 'bl', base_batch = {2 * SAMPLES}}}")
    losses = [e["train_loss"] for e in events(tmp_path, "epoch")]
    assert [loss is None for loss in losses] == [True, False, True, False]


def test_a_run_resumes_from_a_save_within_an_epoch(tmp_path, uninterrupted):
    trainer = runs.trainer(tmp_path, "checkpoint.every_seconds=1e-9")
    before_microbatch(trainer, 24, crash)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    resumed = runs.trainer(tmp_path)
    assert resumed.run.samples == 23 * 8
    assert resumed.train().kind == "done"
    assert_same_run(resumed, tmp_path, uninterrupted)


# Against the planner


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.drop_last=true", "schedule={method='gg', base_batch=24, max_batch=80}"],
        ["schedule={method='tests.schedules.test_own:Doubling', base_batch=24, max_batch=80}"],
    ],
    ids=["drop", "carry"],
)
def test_the_trainer_takes_the_steps_that_the_planner_counts(tmp_path, overrides):
    overrides += ["train.milestones=[1, 3]", "train.lr_decay=0.5"]
    if "Doubling" in overrides[0]:
        overrides.append("schedule.every=1")
    planned = plan(config.parse(runs.JOB, "test", overrides), SAMPLES, 1)["plan"]
    assert runs.train(tmp_path, *overrides).kind == "done"
    (done,) = events(tmp_path, "done")
    assert done["steps"] == planned.steps
    by_batch = {}
    for phase in planned.phases:
        by_batch[phase.global_batch] = by_batch.get(phase.global_batch, 0) + phase.steps
    starts = [e["global_batch"] for e in events(tmp_path, "phase_start")]
    ends = [e["steps"] for e in events(tmp_path, "phase_end")]
    assert dict(zip(starts, ends, strict=True)) == by_batch
    assert len(by_batch) == 3


def test_every_sample_is_read_once_in_each_epoch(tmp_path):
    trainer = runs.trainer(tmp_path)
    get, visits = trainer.loader.get, []

    def record(k, then=()):
        microbatch = get(k, then)
        visits.extend(zip(microbatch.epochs.tolist(), microbatch.samples.tolist(), strict=True))
        return microbatch

    trainer.loader.get = record
    trainer.train()
    assert len(set(visits)) == len(visits) == 69 * 8
    # the last samples of the last epoch do not fill a step
    by_epoch = Counter(epoch for epoch, _ in visits)
    assert [by_epoch[epoch] for epoch in range(3)] == [SAMPLES] * 3


# One step


NONE = np.empty(0, np.int64)


def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def microbatches(count, b=4):
    torch.manual_seed(3)
    return [
        Microbatch(torch.randn(b, 5), torch.randint(0, 3, (b,)), np.arange(b), NONE)
        for _ in range(count)
    ]


class OneStep:
    """The part of a `Run` that `Trainer.train_step` needs."""

    def __init__(self, net, fraction):
        self.clock, self.adversarial_fraction = Clock(), fraction
        self.comm = SerialCommunicator()
        self.engine = StepEngine(
            net,
            torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
            OverlappedReduction(net, SerialCommunicator()),
            seed=0,
            clock=self.clock,
        )
        schedule = SimpleNamespace(global_batch=1)
        progress = SimpleNamespace(schedule=schedule)
        optimizer = self.engine.optimizer
        self.state = SimpleNamespace(model=net, optimizer=optimizer, progress=progress)
        self.stream = SimpleNamespace(microbatch=1, microbatches=0)
        self.result = None

    def begin_step(self, step):
        count = len(step.microbatches)
        return self.engine.begin(step, divisor=count, lr=0.1, flags=Flags())

    def end_step(self, step, result):
        self.result = result


def adversary(step, low=-9.0, high=9.0):
    return Adversary(torch.tensor(step), (torch.tensor(low), torch.tensor(high)))


def take_step(
    net,
    batches,
    *,
    fraction=0.0,
    adversary=None,
    bfloat16=False,
    loss=nn.functional.cross_entropy,
):
    """One step of a trainer with the model `net`; the trainer's run has the result."""
    run = OneStep(net, fraction)
    loader = SimpleNamespace(get=lambda k, then: batches[k], ahead=1)
    trainer = Trainer(run, loader, loss, adversary, bfloat16=bfloat16)
    trainer.train_step(Step(0, len(batches)))
    return run


class Recording(nn.Module):
    """Keeps what `record` returns for each forward pass."""

    def __init__(self, record):
        super().__init__()
        self.inner, self.record, self.seen = classifier(), record, []

    def forward(self, x):
        outputs = self.inner(x)
        self.seen.append(self.record(self, x.detach(), outputs))
        return outputs


def test_a_fraction_of_each_microbatch_becomes_adversarial():
    batches = microbatches(2, b=8)
    net = Recording(lambda net, x, outputs: (net.training, x))
    take_step(net, batches, fraction=0.25, adversary=adversary(0.1))
    trained_on = [inputs for training, inputs in net.seen if training]
    assert len(trained_on) == 2
    for inputs, batch in zip(trained_on, batches, strict=True):
        change = (inputs - batch.inputs).abs()
        assert torch.allclose(change[:2].amax(dim=1), torch.tensor([0.1, 0.1]), atol=1e-6)
        assert torch.equal(change[2:], torch.zeros(6, 5))


@pytest.mark.parametrize(("fraction", "count"), [(0.29, 29), (0.2, 20), (0.999, 99), (1.0, 100)])
def test_the_fraction_is_whole_samples_rounded_down(fraction, count):
    net = Recording(lambda net, x, outputs: (net.training, len(x)))
    take_step(net, microbatches(1, b=100), fraction=fraction, adversary=adversary(0.1))
    assert net.seen == [(False, count), (True, 100)]


def test_adversarial_examples_without_a_change_have_no_effect():
    """With ε = 0 the passes that make them change no weights, statistics or dropout masks."""
    states = []
    for each in (None, adversary(0.0)):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
        )
        take_step(net, microbatches(2), fraction=0.5, adversary=each)
        states.append(net.state_dict())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


def test_adversarial_examples_are_a_kind_of_their_own_in_the_clock():
    run = take_step(classifier(), microbatches(1), fraction=0.5, adversary=adversary(0.1))
    seconds = run.clock.seconds()
    assert seconds["adversarial"] > 0
    assert seconds["comp"] > 0


def test_mixed_precision_computes_in_bfloat16_and_keeps_weights_and_loss_in_float32():
    losses = []

    def loss(outputs, targets):
        losses.append(outputs.dtype)
        return nn.functional.cross_entropy(outputs, targets)

    net = Recording(lambda net, x, outputs: outputs.dtype)
    run = take_step(net, microbatches(1), bfloat16=True, loss=loss)
    assert (net.seen, losses) == ([torch.bfloat16], [torch.float32])
    assert {t.dtype for p in net.parameters() for t in (p, p.grad)} == {torch.float32}
    plain = take_step(classifier(), microbatches(1))
    assert run.result.loss == pytest.approx(plain.result.loss, rel=0.02)
    assert run.result.loss != plain.result.loss


# Runs that learn nothing


@pytest.mark.parametrize(
    "overrides",
    [
        ("schedule.base_batch=600", "schedule.max_batch=600"),
        ("train.epochs=1", "schedule.base_batch=152", "schedule.max_batch=304"),
    ],
)
def test_fewer_samples_than_a_batch_are_refused_before_training(tmp_path, overrides):
    with pytest.raises(CollectiveError, match=r"a global batch of .* no step") as error:
        runs.train(tmp_path, *overrides)
    assert error.value.status == ExitStatus.USAGE
    with pytest.raises(UsageError, match="no step can be taken"):
        plan(config.parse(runs.JOB, "test", overrides), SAMPLES, 4)
    assert runs.kinds(tmp_path) == []


def exploding(trainer, step):
    """Make the weights infinite after this step."""
    end_step = trainer.run.end_step

    def explode(item, result):
        end_step(item, result)
        if trainer.run.state.progress.position.step == step:
            next(trainer.model.parameters()).data.fill_(torch.inf)

    trainer.run.end_step = explode
    return trainer


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path):
    trainer = exploding(runs.trainer(tmp_path), 4)
    with pytest.raises(CollectiveError, match=r"the loss is not finite at step 5 \(") as error:
        trainer.train()
    assert error.value.status == ExitStatus.FAILED
    assert runs.kinds(tmp_path) == ["phase_start", "nonfinite_loss"]
    (event,) = events(tmp_path, "nonfinite_loss")
    assert (event["step"], event["action"]) == (5, "stop")
    current = status(tmp_path)
    assert current.state == "failed"
    assert current.explanation.endswith("The loss is not finite since step 5.")


def test_weights_that_the_last_step_made_infinite_end_the_run(tmp_path):
    trainer = exploding(runs.trainer(tmp_path), 19)  # the last one
    with pytest.raises(CollectiveError, match="the test loss is not finite at step 19"):
        trainer.train()
    assert "done" not in runs.kinds(tmp_path)


def test_a_job_can_continue_with_a_loss_that_is_not_finite(tmp_path):
    trainer = runs.trainer(tmp_path, "train.on_nonfinite_loss=continue")
    console = trainer.run.log._console
    assert exploding(trainer, 4).train().kind == "done"
    (event,) = events(tmp_path, "nonfinite_loss")
    assert (event["step"], event["action"]) == (5, "continue")
    printed = console.getvalue()
    assert printed.count("warning: the loss is not finite at step 5") == 1
    assert "· loss not finite since step 5" in printed.splitlines()[-1]
    current = status(tmp_path)
    assert current.state == "done"
    assert current.explanation == "The job is done. The loss is not finite since step 5."
    assert "The loss is not finite since step 5." in load_history(tmp_path).missing
