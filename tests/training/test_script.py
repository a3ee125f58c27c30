"""`hpc_absa.Run` around a training loop of the user's own, in this process on one rank."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import hpc_absa as absa
from hpc_absa import config
from hpc_absa.errors import CollectiveError, ExitStatus, HpcAbsaError, MisuseError
from hpc_absa.records import Decision, ScheduleState
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import SUPERVISED
from hpc_absa.schedules import Rule
from hpc_absa.training import script_build
from hpc_absa.training.script_job import job_of, require_equal_arguments
from tests.supervisor.digits import PATH
from tests.training.odd_models import ComplexWeights, ExtraState
from tests.training.runs import events

ROOT = Path(__file__).parents[2]
SAMPLES, MICROBATCH, EPOCHS = 70, 4, 4


class Noisy(Dataset):
    """Regression with noise that is drawn whenever a sample is read."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.inputs = torch.randn(SAMPLES, 3, generator=generator)
        self.read = []

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        self.read.append(index)
        x = self.inputs[index] + 0.1 * torch.randn(3) + 0.1 * float(np.random.randn())
        return x, self.inputs[index].sum()


def network():
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(3, 6),
        nn.BatchNorm1d(6),
        nn.Tanh(),
        nn.Dropout(0.2),
        nn.Linear(6, 1),
        nn.Flatten(0),
    )


class Endless(IterableDataset):
    def __iter__(self):
        yield from Noisy()


class Counter:
    """A user's own state."""

    def __init__(self):
        self.steps, self.history = 0, []

    def state_dict(self):
        return {"steps": self.steps, "history": self.history, "none": None, 3: (1.5, "x")}

    def load_state_dict(self, state):
        assert state["none"] is None
        assert state[3] == (1.5, "x")
        self.steps, self.history = state["steps"], state["history"]


class Script:
    """A user's script with everything in it; `stop_at` asks for a stop during that step."""

    def __init__(self, folder, *, dataset=None, stop_at=None, **options):
        self.folder, self.stop_at = folder, stop_at
        self.model = network()
        first, *others = self.model.parameters()
        self.optimizer = torch.optim.AdamW(
            [{"params": [first], "lr": 0.03}, {"params": others}], lr=0.01, amsgrad=True
        )
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, gamma=0.9)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.counter, self.counter_name = Counter(), "counter"
        self.dataset = dataset or Noisy()
        self.options = {
            "schedule": absa.ABS(base_batch=8, max_batch=32, kappa=1),
            "hessian": {"samples": 16, "max_iter": 2},
            "checkpoint": {"async": False},
            "train": {"threads_per_rank": 1},
            "loss": nn.MSELoss(),
            **options,
        }

    def run(self):
        with absa.Run(
            self.folder,
            epochs=EPOCHS,
            microbatch=MICROBATCH,
            dataset=self.dataset,
            lr_scheduler=self.scheduler,
            state={"average": self.average, self.counter_name: self.counter},
            **{
                "model": self.model,
                "optimizer": self.optimizer,
                "evaluate": self.evaluate,
                **self.options,
            },
        ) as run:
            for step in run:
                for inputs, targets in step.batches:
                    step.backward(nn.functional.mse_loss(self.model(inputs), targets))
                step.reduce()
                nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
                step.optimize()
                self.average.update_parameters(self.model)
                self.counter.steps += 1
                self.counter.history.append(step.loss)
                if step.number == self.stop_at:
                    RunDir(self.folder).stop_request.touch()
        return self

    def evaluate(self):
        assert not self.model.training
        assert not self.average.training
        loss = nn.functional.mse_loss(self.model(self.dataset.inputs), self.dataset.inputs.sum(1))
        return {"loss": loss, "steps": self.counter.steps}

    def bits(self):
        """Everything that the run changes."""
        state = [
            self.model.state_dict(),
            self.optimizer.state_dict(),
            self.scheduler.state_dict(),
            self.average.state_dict(),
            self.counter.state_dict(),
        ]
        file = io.BytesIO()
        torch.set_printoptions(precision=17, threshold=10**6)
        file.write(repr(state).encode())
        return file.getvalue()


def decisions(folder):
    return [e["next_batch"] for e in events(folder, "decision") if e["action"] == "grow"]


@pytest.mark.parametrize("reproducible", [False, True])
def test_a_run_that_is_stopped_anywhere_continues_bit_for_bit(tmp_path, reproducible):
    whole = Script(tmp_path / "whole", reproducible=reproducible).run()
    assert decisions(tmp_path / "whole") == [16, 32]
    steps = whole.counter.steps
    for stop_at in (1, 9, steps - 1):
        folder = tmp_path / f"stopped{stop_at}"
        with pytest.raises(SystemExit) as stopped:
            Script(folder, reproducible=reproducible, stop_at=stop_at).run()
        assert stopped.value.code == ExitStatus.STOPPED
        resumed = Script(folder, reproducible=reproducible).run()
        assert resumed.counter.steps == steps
        assert resumed.bits() == whole.bits()
        assert events(folder, "done") == events(tmp_path / "whole", "done")


@pytest.mark.slow
def test_workers_read_the_same_batches_also_where_the_batch_grows(tmp_path):
    whole = Script(tmp_path / "whole").run()
    for stop_at in (None, 9):
        folder = tmp_path / f"workers{stop_at}"
        if stop_at:
            with pytest.raises(SystemExit):
                Script(folder, num_workers=2, stop_at=stop_at).run()
        assert Script(folder, num_workers=2).run().bits() == whole.bits()


def test_every_sample_is_read_once_an_epoch_in_the_order_of_the_seed(tmp_path):
    script = Script(tmp_path, schedule=absa.FB(base_batch=8))
    script.run()
    used = EPOCHS * SAMPLES // 8 * 8
    reads = script.dataset.read[-used:]  # after those that identify the data set
    for epoch in range(EPOCHS - 1):
        assert sorted(reads[epoch * SAMPLES : (epoch + 1) * SAMPLES]) == list(range(SAMPLES))
    assert reads[:SAMPLES] != reads[SAMPLES : 2 * SAMPLES]


def test_groups_keep_their_own_learning_rates_times_the_factor_of_the_schedule(tmp_path):
    schedule = absa.FB(base_batch=8, max_batch=16, warmup_epochs=0)
    script, seen = Script(tmp_path, schedule=schedule), []
    script.optimizer.register_step_pre_hook(
        lambda optimizer, *_: seen.append([group["lr"] for group in optimizer.param_groups])
    )
    script.run()
    # the rule for AdamW multiplies both by √2, and torch's scheduler decays them
    factor, decay = 2**0.5, 0.9 ** (EPOCHS - 1)
    assert seen[0] == pytest.approx([0.03 * factor, 0.01 * factor])
    assert seen[-1] == pytest.approx([0.03 * factor * decay, 0.01 * factor * decay])
    assert [g["lr"] for g in script.optimizer.param_groups] == pytest.approx(
        [0.03 * 0.9**EPOCHS, 0.01 * 0.9**EPOCHS]
    )


def test_a_sum_with_its_denominator_is_the_mean_over_the_step(tmp_path):
    inputs = Noisy().inputs
    weights = torch.arange(SAMPLES) % 3

    def train(folder, microbatch, weighted):
        model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
        nn.init.ones_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        with absa.Run(
            folder,
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            schedule=absa.FB(base_batch=8),
            epochs=1,
            microbatch=microbatch,
            samples=SAMPLES,
        ) as run:
            for step in run:
                for indices in step.microbatches:
                    w = weights[indices]
                    errors = w * (model(inputs[indices]) - 1).square()
                    step.backward(weighted(errors.sum(), w.sum()))
                step.optimize()
        return model[0].weight

    whole = train(tmp_path / "whole", 8, lambda total, count: total / count)
    parts = train(tmp_path / "parts", 2, lambda total, count: (total, count))
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("max_grad_norm", [None, 0.05])
def test_a_scaler_of_the_loss_changes_nothing_where_nothing_overflows(tmp_path, max_grad_norm):
    def train(folder, scaler):
        settings = {"threads_per_rank": 1, "max_grad_norm": max_grad_norm}
        script = Script(folder, scaler=scaler, train=settings)
        script.run()
        return script

    plain = train(tmp_path / "plain", None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    scaled = train(tmp_path / "scaled", scaler)
    assert scaler.get_scale() > 2.0**10
    for ours, theirs in zip(plain.model.parameters(), scaled.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert absa.load_checkpoint(tmp_path / "scaled").state["scaler"]["scale"] == scaler.get_scale()


def test_a_scaler_leaves_no_gradient_scaled(tmp_path):
    """Also of parameters that the optimizer does not have, which a second one may train."""
    inputs = Noisy().inputs

    def gradients(folder, scaler):
        torch.manual_seed(0)
        model, found = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1)), []
        with absa.Run(
            folder,
            model=model,
            optimizer=torch.optim.SGD(model[0].parameters(), lr=0.1),
            schedule=absa.FB(base_batch=8),
            epochs=1,
            microbatch=4,
            samples=SAMPLES,
            scaler=scaler,
            train={"threads_per_rank": 1, "max_grad_norm": 0.01},
        ) as run:
            for step in run:
                for indices in step.microbatches:
                    step.backward(model(inputs[indices]).square().mean())
                step.reduce()
                if step.number == 1:
                    found += [p.grad.clone() for p in model.parameters()]
                step.optimize()
        return found

    plain = gradients(tmp_path / "plain", None)
    scaled = gradients(tmp_path / "scaled", torch.amp.GradScaler("cpu"))
    assert len(plain) == 4
    for ours, theirs in zip(scaled, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_scaler_takes_a_step_without_a_loss(tmp_path):
    """As of a rank without a microbatch, or where no target counts."""
    model, inputs = nn.Linear(3, 1), Noisy().inputs
    scaler, scales, weights = torch.amp.GradScaler("cpu", growth_interval=1), [], []
    with absa.Run(
        tmp_path,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        schedule=absa.FB(base_batch=8),
        epochs=1,
        microbatch=4,
        samples=SAMPLES,
        scaler=scaler,
    ) as run:
        for step in run:
            for indices in step.microbatches:
                total = model(inputs[indices]).square().sum()
                step.backward((total, 0.0 if step.number in (1, 3) else 4.0))
            step.optimize()
            scales.append(scaler.get_scale())
            weights.append(model.weight.detach().clone())
    assert scales[0] == scales[1] / 2 == scales[2] / 2 == scales[3] / 4 == 2.0**16
    assert torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[0], weights[1])


class MeasuresLater(Rule):
    """Grows once, and measures gradients from then on."""

    def __init__(self, base_batch, lr):
        self.start = ScheduleState(base_batch, lr)

    def initial(self):
        return self.start

    def decide(self, state, seen):
        if self.wants_gradients(state):
            return Decision("continue", "grown", state)
        return Decision("grow", "once", replace(state, global_batch=2 * state.global_batch))

    def wants_gradients(self, state):
        return state.global_batch > self.start.global_batch


class EstimatesLater(MeasuresLater):
    """Likewise, with λ."""

    def decide(self, state, seen):
        if self.wants_eigenvalue(state):
            return Decision("continue", "grown", state)
        return super().decide(state, seen)

    def wants_eigenvalue(self, state):
        return super().wants_gradients(state)

    def wants_gradients(self, state):
        return False


def test_a_rule_that_needs_a_loss_later_is_refused_then(tmp_path):
    schedule = absa.UserDefined(
        method="tests.training.test_script:EstimatesLater", base_batch=8, max_batch=16
    )
    script = Script(tmp_path, schedule=schedule, loss=None)
    with pytest.raises(MisuseError, match="estimates an eigenvalue: expected loss"):
        script.run()
    assert script.counter.steps


def test_a_rule_that_measures_gradients_of_a_scaled_loss_is_refused_when_it_begins(tmp_path):
    schedule = absa.UserDefined(
        method="tests.training.test_script:MeasuresLater", base_batch=8, max_batch=16
    )
    script = Script(tmp_path, schedule=schedule, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(HpcAbsaError, match="scaler: expected none with a schedule that measures"):
        script.run()
    assert script.counter.steps


def test_a_disabled_scaler_does_not_prevent_measuring_gradients(tmp_path):
    schedule = absa.GNS(base_batch=8, max_batch=16)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert Script(tmp_path, schedule=schedule, scaler=scaler).run().counter.steps


def test_a_checkpoint_is_read_as_plain_tensors_and_values(tmp_path):
    script = Script(tmp_path).run()
    checkpoint = absa.load_checkpoint(tmp_path)
    assert checkpoint.state["counter"]["history"] == script.counter.history
    assert checkpoint.step == script.counter.steps
    for name, tensor in script.model.state_dict().items():
        assert torch.equal(checkpoint.model[name], tensor)
    average = AveragedModel(network())
    average.load_state_dict(checkpoint.state["average"])
    assert torch.equal(average.module[0].weight, script.average.module[0].weight)


# The end


def test_a_finished_run_gives_its_model_and_no_steps(tmp_path):
    done = Script(tmp_path).run()
    count = len(events(tmp_path))
    again = Script(tmp_path).run()
    assert again.bits() == done.bits()
    assert len(events(tmp_path)) == count


def test_a_loop_that_is_left_early_ends_the_run(tmp_path):
    model = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1), nn.Flatten(0))
    for _ in range(2):
        with absa.Run(
            tmp_path,
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            schedule=absa.FB(base_batch=8),
            epochs=1,
            microbatch=4,
            dataset=Noisy(),
        ) as run:
            for step in run:
                for inputs, targets in step.batches:
                    step.backward((model(inputs) - targets).square().mean())
                step.optimize()
                if step.number == 3:
                    break
    [done] = events(tmp_path, "done")
    assert done["steps"] == 3
    # The model is a plain one again.
    before = model[1].running_mean.clone()
    model(torch.randn(8, 3))
    assert not torch.equal(model[1].running_mean, before)


def test_a_script_without_a_loop_leaves_its_run_as_it_was(tmp_path):
    for _ in range(2):
        script = Script(tmp_path)
        with absa.Run(
            tmp_path,
            model=script.model,
            optimizer=script.optimizer,
            epochs=EPOCHS,
            microbatch=MICROBATCH,
            dataset=script.dataset,
            **script.options,
        ) as run:
            assert run.sum(2) == 2
    assert Script(tmp_path).run().counter.steps


def test_a_run_is_used_within_its_with_statement(tmp_path):
    model = nn.Linear(3, 1)
    with absa.Run(
        tmp_path,
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        schedule=absa.FB(base_batch=8),
        epochs=1,
        microbatch=4,
        samples=SAMPLES,
    ) as run:
        assert run.sum(2) == 2
    for use_later in (lambda: run.sum(2), lambda: next(iter(run))):
        with pytest.raises(MisuseError, match=r"within `with absa\.Run"):
            use_later()


def test_an_error_of_the_script_is_raised_and_the_run_can_be_continued(tmp_path):
    script = Script(tmp_path)
    script.evaluate = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        script.run()
    assert Script(tmp_path).run().counter.steps
    assert events(tmp_path, "done")


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": {"momentum": 0.9}}, r"train\['momentum'\]: expected one of annealing"),
        ({"samples": 70}, "expected either dataset or samples"),
        ({"hessian": {"layer_rates": "trace"}}, r"hessian\['layer_rates'\]: expected none"),
        ({"hessian": {"sample": 3}}, "hessian.sample = 3: unknown key, expected 'samples'"),
        ({"loss": nn.MSELoss(reduction="sum")}, "the loss has reduction = 'sum': expected a mean"),
        ({"seed": -1}, "seed = -1: expected greater than or equal to 0"),
        ({"schedule": absa.ABS(base_batch=6)}, "schedule.base_batch = 6: expected a multiple"),
        ({"schedule": "absa"}, "schedule = 'absa': expected one such as absa.ABSA"),
        (
            {"dataset": DataLoader(Noisy())},
            "dataset is a DataLoader, expected a map-style data set",
        ),
        ({"dataset": Endless()}, "dataset is a Endless, expected a map-style data set"),
        ({"model": nn.Linear}, "expected a torch Module, got <class"),
        (
            {"model": nn.DataParallel(nn.Linear(3, 1))},
            "wrapped in DataParallel; expected the model",
        ),
        ({"model": nn.Linear(3, 1).requires_grad_(False)}, "no parameter with requires_grad"),
        ({"model": ComplexWeights()}, r"model: the parameter weight is torch\.complex64, expected"),
        ({"optimizer": torch.optim.SGD}, "expected a torch Optimizer, got <class"),
        ({"optimizer": torch.optim.LBFGS([torch.zeros(3)])}, "LBFGS: its step needs a closure"),
        (
            {"evaluate": lambda: (0.5, 0.9)},
            r"evaluate returned \(0.5, 0.9\): expected the test loss",
        ),
        ({"evaluate": lambda: {"loss": "low"}}, "evaluate returned .*: expected the test loss"),
        (
            {
                "scaler": torch.amp.GradScaler("cpu"),
                "schedule": absa.GNS(base_batch=8, max_batch=16),
            },
            "scaler",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(tmp_path, options, message):
    with pytest.raises(HpcAbsaError, match=message) as error:
        Script(tmp_path, **options).run()
    assert "\n" not in str(error.value)


def test_a_data_set_that_workers_cannot_get_is_an_error_of_all_ranks(tmp_path, monkeypatch):
    errors, fail = [], absa.Run._fail

    def recorded(run, error):
        errors.append(error)
        fail(run, error)

    monkeypatch.setattr(absa.Run, "_fail", recorded)
    script = Script(tmp_path, num_workers=1)
    script.dataset.transform = lambda x: x
    with pytest.raises(HpcAbsaError, match="sending it to 1 worker processes failed"):
        script.run()
    [error] = errors
    assert isinstance(error, CollectiveError)


def test_a_scheduler_that_needs_a_loss_is_refused_before_the_first_step(tmp_path):
    script = Script(tmp_path, evaluate=None)
    script.scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(script.optimizer)
    with pytest.raises(MisuseError, match="ReduceLROnPlateau needs the loss from evaluate"):
        script.run()
    assert not script.counter.steps


def test_a_state_may_have_the_name_of_one_of_ours(tmp_path):
    script = Script(tmp_path)
    script.counter_name = "lr_scheduler"
    script.run()
    state = absa.load_checkpoint(tmp_path).state
    assert state["lr_scheduler"]["steps"] == script.counter.steps
    assert state["lr_scheduler_"]["last_epoch"] == EPOCHS


def test_a_state_that_is_not_made_of_plain_values_is_refused_by_name(tmp_path):
    script = Script(tmp_path)
    script.counter.history = [{"model": network()}]
    with pytest.raises(
        HpcAbsaError, match=r"state\['counter'\]\['history'\]\[0\]\['model'\] is of"
    ):
        script.run()


def test_a_state_that_becomes_something_else_is_a_usage_error_of_all_ranks(tmp_path):
    script = Script(tmp_path)
    script.evaluate = lambda: script.counter.history.append(np.float64(0.5))
    with pytest.raises(
        CollectiveError, match=r"state\['counter'\]\['history'\]\[\d+\] is of type float64"
    ) as error:
        script.run()
    assert error.value.status == ExitStatus.USAGE


def test_a_model_with_a_state_that_is_no_tensor_is_refused_at_start(tmp_path):
    model = ExtraState()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(HpcAbsaError, match="_extra_state is of type dict; checkpoints contain"):
        Script(tmp_path, model=model, optimizer=optimizer).run()
    assert not events(tmp_path)


class Wrapping(torch.optim.SGD):
    """Has a part of its state elsewhere, as Lookahead."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        return super().step(closure)

    def state_dict(self):
        return {**super().state_dict(), "steps": self.steps}

    def load_state_dict(self, state_dict):
        self.steps = state_dict.pop("steps")
        super().load_state_dict(state_dict)


def test_an_optimizer_with_a_state_dict_of_its_own_must_be_in_state(tmp_path):
    model, inputs = nn.Linear(3, 1), Noisy().inputs
    optimizer = Wrapping(model.parameters(), lr=0.1, momentum=0.9)

    def train(**state):
        with absa.Run(
            tmp_path,
            model=model,
            optimizer=optimizer,
            schedule=absa.FB(base_batch=8),
            epochs=1,
            microbatch=4,
            samples=SAMPLES,
            state=state,
        ) as run:
            for step in run:
                for indices in step.microbatches:
                    step.backward(model(inputs[indices]).square().mean())
                step.optimize()

    with pytest.raises(HpcAbsaError, match="Wrapping has a state_dict of its own"):
        train()
    train(optimizer=optimizer)
    steps, optimizer.steps = optimizer.steps, 0
    train(optimizer=optimizer)
    assert optimizer.steps == steps == SAMPLES // 8


def test_a_run_is_not_continued_with_other_arguments(tmp_path):
    with pytest.raises(SystemExit):
        Script(tmp_path, stop_at=3).run()
    with pytest.raises(HpcAbsaError, match="seed = 0 there, 1 here"):
        Script(tmp_path, seed=1).run()
    other = Script(tmp_path)
    other.optimizer.param_groups[1]["weight_decay"] = 0.5
    with pytest.raises(HpcAbsaError, match=r"optimizer.groups = .*weight_decay"):
        other.run()
    other.options["allow_changed"] = ["optimizer.groups"]
    assert other.run().optimizer.param_groups[1]["weight_decay"] == 0.5


def use(folder, body, **data):
    """A run whose steps are given to `body`."""
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with absa.Run(
        folder,
        model=model,
        optimizer=optimizer,
        schedule=absa.FB(base_batch=8),
        epochs=1,
        microbatch=4,
        train={"threads_per_rank": 1},
        **(data or {"dataset": Noisy()}),
    ) as run:
        for step in run:
            body(step, model, optimizer)


def each(step, model, then):
    for inputs, targets in step.batches:
        then((model(inputs) - targets).square().mean())


def zero_grad(step, model, optimizer):
    for inputs, targets in step.batches:
        optimizer.zero_grad()
        step.backward((model(inputs) - targets).square().mean())
    step.optimize()


def freeze(step, model, optimizer):
    model[0].bias.requires_grad_(False)
    each(step, model, step.backward)
    step.optimize()


def add(step, model, optimizer):
    model[0].extra = nn.Parameter(torch.ones(1))
    each(step, model, lambda loss: step.backward(loss * model[0].extra.sum()))
    step.optimize()


def add_group(step, model, optimizer):
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    each(step, model, step.backward)
    step.optimize()


def step_twice(step, model, optimizer):
    each(step, model, step.backward)
    step.reduce()
    optimizer.step()


def optimize_twice(step, model, optimizer):
    each(step, model, step.backward)
    step.optimize()
    step.optimize()


def changing(change):
    """Each microbatch is followed by `change`, which must not be lost in the sum over ranks."""

    def body(step, model, optimizer):
        each(step, model, lambda loss: (step.backward(loss), change(model, optimizer)))
        step.optimize()

    return body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda step, model, optimizer: None, "without step.optimize"),
        (lambda s, m, _: (each(s, m, s.backward), s.reduce()), "without step.optimize"),
        (lambda step, model, optimizer: step.optimize(), "a loop over all of its microbatches"),
        (lambda step, model, _: each(step, model, lambda loss: loss.backward()), "step.backward"),
        (lambda step, *_: step.backward(torch.ones(())), "expected one call for each microbatch"),
        (
            lambda s, m, _: (each(s, m, s.backward), each(s, m, s.backward)),
            "expected one loop over its microbatches",
        ),
        (zero_grad, r"\.grad was changed during a step"),
        (freeze, "requires_grad of a parameter was changed during a run"),
        (add, r"the parameter 0\.extra was added to the model, or unfrozen, during a run"),
        (add_group, "the optimizer has parameters that the model has not"),
        (step_twice, r"optimizer.step\(\) was called: expected step.optimize"),
        (optimize_twice, "step.optimize: expected one call for each step"),
        (
            changing(lambda _, o: o.zero_grad(set_to_none=False)),
            r"\.grad was changed during a step",
        ),
        (changing(lambda m, _: nn.utils.clip_grad_norm_(m.parameters(), 1e-3)), "was changed"),
        (changing(lambda m, _: m(torch.ones(2, 3)).sum().backward()), "was changed"),
        (
            lambda s, m, _: each(s, m, lambda loss: s.backward(loss.item())),
            r"got \d.*: expected the mean",
        ),
        (
            lambda s, m, _: each(s, m, lambda loss: s.backward(loss * torch.ones(3))),
            r"got shape \[3\]",
        ),
        (
            lambda s, m, _: each(s, m, lambda loss: s.backward((loss, 4.0, 1))),
            r"got \(tensor.*: expected the mean",
        ),
    ],
)
def test_a_loop_that_uses_a_step_in_another_way_is_refused(tmp_path, body, message):
    with pytest.raises(HpcAbsaError, match=message):
        use(tmp_path, body)


def test_batches_of_a_run_that_reads_no_data_are_refused(tmp_path):
    with pytest.raises(MisuseError, match=r"step.batches: expected a run with dataset"):
        use(tmp_path, lambda step, *_: next(step.batches), samples=SAMPLES)


def test_the_number_of_samples_may_be_an_integer_of_any_library(tmp_path):
    inputs = Noisy().inputs

    def body(step, model, optimizer):
        for indices in step.microbatches:
            step.backward(model(inputs[indices]).square().mean())
        step.optimize()

    use(tmp_path, body, samples=np.int64(SAMPLES))
    assert events(tmp_path, "done")
    with pytest.raises(HpcAbsaError, match=r"samples = 70\.0: expected an integer"):
        use(tmp_path, body, samples=70.0)


def test_a_learning_rate_that_a_checkpoint_cannot_have_is_refused_by_name(tmp_path):
    script = Script(tmp_path)
    script.optimizer.param_groups[1].update(lr=np.float32(0.01), initial_lr=np.float32(0.01))
    with pytest.raises(HpcAbsaError, match=r"optimizer\['lr'\] is of type float32"):
        script.run()


def test_what_a_user_should_know_of_the_hessian_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script_build, "check_curvature", lambda *given, **options: ["a note"])
    Script(tmp_path).run()
    assert "a note\n" in capsys.readouterr().out


def test_what_a_script_does_between_steps_is_not_part_of_a_microbatch(tmp_path):
    kinds = []

    def body(step, model, optimizer):
        clock = step._run.clock
        kinds.append(clock.activity()[0])
        each(step, model, step.backward)
        step.optimize()
        kinds.append(clock.activity()[0])

    use(tmp_path, body)
    assert kinds == ["comp", "other"] * (SAMPLES // 8)


def test_a_stop_waits_for_what_a_script_does_between_steps(tmp_path):
    """Without progress, a rank that was asked to stop is ended: it may wait for a dead one."""
    waits = []

    def body(step, model, optimizer):
        each(step, model, step.backward)
        waits.append(step._run.stop._saving)
        step.optimize()
        waits.append(step._run.stop._saving)

    use(tmp_path, body)
    assert waits == [False, True] * (SAMPLES // 8)


def test_the_job_of_a_script_says_how_it_was_made(tmp_path):
    Script(tmp_path).run()
    text = RunDir(tmp_path).job.read_text()
    for line in (
        'type = "torch.nn.modules.container:Sequential"',
        'AdamW"',
        "samples = 70",
        'method = "abs"',
    ):
        assert line in text
    assert json.loads(json.dumps(events(tmp_path, "epoch")[0]))["metrics"]["steps"] > 0


def test_the_timeouts_of_the_launcher_hold_in_a_script(tmp_path, monkeypatch):
    script, run = Script(tmp_path), RunDir(tmp_path)
    given = absa.Run(
        model=script.model,
        optimizer=script.optimizer,
        schedule=absa.FB(base_batch=8),
        epochs=1,
        microbatch=4,
        samples=SAMPLES,
    )._given
    run.write_launch("[launch]\nprogress_timeout = 7200.0\nmax_restarts = 1\n")
    assert job_of(run, given, 1).launch.progress_timeout == 1800
    monkeypatch.setenv(SUPERVISED, "1")
    assert job_of(run, given, 1).launch == config.Launch(progress_timeout=7200.0)


@pytest.mark.parametrize(
    ("rank_1", "line"), [({}, None), ({"seed": 1}, "seed = 0 on rank 0, seed")]
)
def test_arguments_that_depend_on_the_rank_are_refused(rank_1, line):
    class TwoRanks:
        def allgather_object(self, text):
            return [text, config.dump(job.model_copy(update=rank_1))]

    job = config.load(PATH)
    if line is None:
        require_equal_arguments(job, TwoRanks())
    else:
        with pytest.raises(CollectiveError, match=line):
            require_equal_arguments(job, TwoRanks())


@pytest.mark.slow
def test_a_script_that_its_workers_would_run_again_is_refused(tmp_path):
    (tmp_path / "unguarded.py").write_text(
        "import torch, hpc_absa as absa\n"
        "class Ones(torch.utils.data.Dataset):\n"
        "    def __len__(self): return 4\n"
        "    def __getitem__(self, index): return torch.ones(1)\n"
        "model = torch.nn.Linear(1, 1)\n"
        "with absa.Run(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),\n"
        "              schedule=absa.FB(base_batch=2), epochs=1, microbatch=2,\n"
        "              dataset=Ones(), num_workers=1) as run:\n"
        "    for step in run:\n"
        "        for batch in step.batches:\n"
        "            step.backward(model(batch).mean())\n"
        "        step.optimize()\n"
    )
    done = subprocess.run(
        [sys.executable, "unguarded.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode
    assert "expected all but imports and definitions under if __name__" in done.stderr
    assert "absa.Run: dataset: a worker process ended, see its error above" in done.stderr
