"""The core without job file, Loader and Trainer: a plain loop with its own data and optimizer.

A regression with two inputs, float targets and AdamW; the eigenvalue is a stub's.
"""

import io

import numpy as np
import pytest
import torch
from torch import nn

from hpc_absa.checkpoint import CheckpointManager
from hpc_absa.checkpoint.async_checkpointer import AsyncCheckpointer
from hpc_absa.checkpoint.restore import newest_good
from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature.estimate import Estimate, Interrupted
from hpc_absa.data.order import permutation
from hpc_absa.progress import Position, Progress, SampleStream, Step
from hpc_absa.records import Eigenvalue, PhaseOutcome
from hpc_absa.rundir import RunDir
from hpc_absa.schedules import ABS, TrainSettings
from hpc_absa.training.clock import Clock
from hpc_absa.training.log import EventLogger
from hpc_absa.training.reduction import OverlappedReduction
from hpc_absa.training.run import Run, RunOptions
from hpc_absa.training.state import TrainState
from hpc_absa.training.step import StepEngine
from tests.training.runs import Stop, events, state_bits

SAMPLES, MICROBATCH, EPOCHS, SEED = 70, 4, 5, 3
STREAM = SampleStream(SAMPLES, MICROBATCH, EPOCHS, every=SAMPLES // 2)


class Regression(nn.Module):
    """Of two inputs, [b, 3] and [b, 2]; returns [b]."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.last = nn.Linear(3, 6), nn.Linear(2, 6), nn.Linear(6, 1)

    def forward(self, a, b):
        hidden = torch.tanh(self.left(a) * self.right(b))
        return self.last(nn.functional.dropout(hidden, 0.2, self.training)).squeeze(1)


def data():
    """Inputs as a dictionary of tensors, and float targets."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SAMPLES, width, generator=generator) for width in (3, 2))
    return {"a": a, "b": b}, a.sum(dim=1) * b.prod(dim=1)


def estimator(start, threshold, poll, draw):
    """An eigenvalue that never falls; its vector counts the estimates."""
    if poll():
        raise Interrupted
    vector = torch.ones(49) if start is None else start + 1
    eigenvalue = Eigenvalue(1.0, 0.0, 1, SAMPLES, 0.0, converged=True)
    return Estimate(eigenvalue, vector, 1.0, 0, SAMPLES)


def begin(folder, stop, estimator=estimator):
    """A run at the newest checkpoint in `folder`."""
    comm, clock, directory = SerialCommunicator(), Clock(), RunDir(folder).create()
    rule = ABS(base_batch=8, max_batch=32, kappa=3).bind(
        TrainSettings(epochs=EPOCHS, microbatch=MICROBATCH, lr=0.01)
    )
    torch.manual_seed(SEED)
    model = Regression()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, amsgrad=True)
    state = TrainState(model, optimizer, Progress(Position(), rule.initial()))
    manager = CheckpointManager(directory.checkpoints, keep=2)
    restored = newest_good(manager, comm)
    if restored:
        state.restore(restored.content, restored.path.name)
    log = EventLogger(directory, comm.rank, io.StringIO())
    reduction = OverlappedReduction(model, comm)
    return Run(
        comm=comm,
        directory=directory,
        stream=STREAM,
        rule=rule,
        state=state,
        engine=StepEngine(model, optimizer, reduction, seed=SEED, clock=clock),
        estimator=estimator,
        checkpointer=AsyncCheckpointer(
            manager,
            comm,
            background=True,
            shard_bytes=1 << 20,
            on_error="stop",
            warn=log.save_failed,
        ),
        stop=stop,
        log=log,
        options=RunOptions(
            seed=SEED,
            data_digest="synthetic",
            job="",
            save_seconds=600.0,
            rank_limit=1,
            ranks_for=lambda batch: 1,
            resumed_from=restored.path.name if restored else None,
        ),
    )


def indices(k):
    """The samples of microbatch `k`."""
    return np.concatenate(
        [permutation(SEED, s.epoch, SAMPLES)[s.start : s.stop] for s in STREAM.segments(k)]
    )


def train(run, on_microbatch=lambda k: None):
    """The loop of a user's script."""
    inputs, targets = data()
    model = run.state.model

    def train_step(item):
        step = run.begin_step(item)
        for k in step.microbatches:
            on_microbatch(k)
            chosen = indices(k)
            with step.forward():
                outputs = model(**{name: tensor[chosen] for name, tensor in inputs.items()})
            loss = nn.functional.mse_loss(outputs, targets[chosen])
            step.backward(loss, samples=len(chosen))
        run.end_step(item, step.optimize())

    run.begin_phase()
    while (item := run.next()) is not None:
        if isinstance(item, Step):
            train_step(item)
            continue
        if run.needs_evaluation(item):
            model.eval()
            with torch.no_grad():
                run.record_epoch(item, nn.functional.mse_loss(model(**inputs), targets).item())
            model.train()
        estimate = run.estimate_eigenvalue(item)
        if run.stopped:
            continue
        decision = run.decide(item, estimate)
        if step := run.cut_step(item, decision):
            train_step(step)
        run.apply(item, decision, estimate)
    return run.end()


@pytest.fixture(name="uninterrupted", scope="module")
def _uninterrupted(tmp_path_factory):
    """The folder and the final state of a run without a stop."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    run = begin(folder, Stop())
    assert train(run) == PhaseOutcome("done", 1, 3)
    return folder, state_bits(run.state)


def test_a_plain_loop_trains_and_grows(uninterrupted):
    folder, _ = uninterrupted
    epochs, decisions = events(folder, "epoch"), events(folder, "decision")
    assert epochs[-1]["test_loss"] < epochs[0]["test_loss"]
    assert {e["test_accuracy"] for e in epochs} == {None}
    # patience ends at the third and at the sixth decision; the last one is the end of the run
    assert [e["epoch"] for e in decisions if e["action"] == "grow"] == [1.5, 3.0]
    assert [e["next_batch"] for e in decisions if e["action"] == "grow"] == [16, 32]
    assert [e["action"] for e in decisions].count("finish") == 1
    assert events(folder, "done")[0]["test_accuracy"] is None


def test_an_estimate_starts_from_the_eigenvector_of_the_previous_one(tmp_path):
    starts = []

    def record(start, threshold, poll, draw):
        starts.append((None if start is None else start[0].item(), threshold))
        return estimator(start, threshold, poll, draw)

    stop = Stop()
    run = begin(tmp_path, stop, record)
    train(run, lambda k: setattr(stop, "now", k == 20))
    resumed = begin(tmp_path, Stop(), record)
    train(resumed)
    # up to the last growth, at epoch 3; the threshold is known once there is a reference
    assert starts == [(None, None), (1, 0.5), (2, 0.5), (3, 0.5), (4, 0.5), (5, 0.5)]
    assert resumed.state.eigenvector.tolist() == [6] * 49


def test_the_training_loss_of_an_epoch_is_the_mean_over_the_samples_of_its_steps(tmp_path):
    run = begin(tmp_path, Stop())
    end_step, record_epoch, means, results = run.end_step, run.record_epoch, [], []

    def record_step(step, result):
        results.append(result)
        end_step(step, result)

    def record_mean(boundary, loss):
        means.append(sum(r.loss for r in results) / sum(r.samples for r in results))
        results.clear()
        record_epoch(boundary, loss)

    run.end_step, run.record_epoch = record_step, record_mean
    train(run)
    assert [e["train_loss"] for e in events(tmp_path, "epoch")] == pytest.approx(means)
    assert len(set(means)) == EPOCHS


def test_progress_events_have_loss_norm_and_memory_of_the_steps_since_the_last(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("hpc_absa.training.log.PROGRESS_SECONDS", (0.0, 0.0))
    run = begin(tmp_path, Stop())
    run.engine.max_grad_norm = 1e-3
    end_step, results, norms = run.end_step, [], []

    def record(step, result):
        results.append(result)
        gradients = [p.grad for p in run.state.model.parameters()]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
        end_step(step, result)

    run.end_step = record
    train(run)
    written = [e for e in run.directory.log.read() if e["event"] == "progress"]
    assert [e["step"] for e in written] == list(range(1, len(results) + 1))
    assert [e["train_loss"] for e in written] == [r.loss / r.samples for r in results]
    assert all(e["samples_per_second"] > 0 and e["memory"] > 2**20 for e in written)
    # of the gradient before clipping, where it is clipped
    assert max(norms) < 1.01e-3 < min(e["grad_norm"] for e in written)
    assert [e["grad_norm"] for e in written] == [r.unclipped_norm.item() for r in results]


def test_a_run_that_is_done_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr("hpc_absa.checkpoint.async_checkpointer.WRITER_BYTES", 0)
    run = begin(tmp_path, Stop())
    writer, pids = run._checkpointer._writer, []
    train(run, lambda k: pids.append(writer.pid))
    assert pids[-1]
    assert writer.pid is None


def test_a_run_that_fails_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr("hpc_absa.checkpoint.async_checkpointer.WRITER_BYTES", 0)
    run = begin(tmp_path, Stop())
    writer = run._checkpointer._writer

    def fail(k):
        if writer.pid:
            raise KeyError(k)

    with pytest.raises(KeyError):
        train(run, fail)
    assert writer.pid
    run.wait_for_writes()
    assert writer.pid is None


def test_a_finished_run_is_restored_with_the_optimizer_and_takes_no_step(uninterrupted):
    folder, bits = uninterrupted
    steps = events(folder, "done")[0]["steps"]
    run = begin(folder, Stop())
    assert state_bits(run.state) == bits
    assert run.next() is None
    assert len(run.state.optimizer.state) == 6
    for state in run.state.optimizer.state.values():
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}
        assert state["step"] == steps


@pytest.mark.parametrize("microbatch", [9, 27, 31, 60])
def test_a_stop_at_any_step_changes_nothing(tmp_path, uninterrupted, microbatch):
    stop = Stop()

    def stop_at(k):
        stop.now |= k == microbatch

    run = begin(tmp_path, stop)
    assert train(run, stop_at).kind == "stopped"
    assert run.samples < SAMPLES * EPOCHS
    resumed = begin(tmp_path, Stop())
    assert state_bits(resumed.state) == state_bits(run.state)
    assert train(resumed).kind == "done"
    assert_same_run(resumed, tmp_path, uninterrupted)


def test_a_stop_during_each_estimate_changes_nothing(tmp_path, uninterrupted):
    first = begin(tmp_path, Stop(during_estimate=True))
    assert train(first) == PhaseOutcome("stopped", 1, 1)
    assert first.state.progress.position.boundary == 0
    again = begin(tmp_path, Stop(during_estimate=True))
    assert train(again) == PhaseOutcome("stopped", 1, 1)
    assert state_bits(again.state) == state_bits(first.state)
    resumed = begin(tmp_path, Stop())
    assert train(resumed).kind == "done"
    assert_same_run(resumed, tmp_path, uninterrupted)


def assert_same_run(run, folder, uninterrupted):
    """The same bits, and each epoch event and decision once."""
    reference, bits = uninterrupted
    assert state_bits(run.state) == bits
    for kind in ("epoch", "decision", "done"):
        assert events(folder, kind) == events(reference, kind), kind


def test_a_step_of_two_microbatches_is_one_of_pytorch_on_both(tmp_path):
    run = begin(tmp_path, Stop())
    run.begin_phase()
    item, chosen = run.next(), np.concatenate([indices(0), indices(1)])
    assert item == Step(0, 2)
    torch.manual_seed(SEED)
    model = Regression().eval()
    run.state.model.eval()  # without dropout
    inputs, targets = data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.lr, weight_decay=0.1, amsgrad=True)
    outputs = model(**{name: tensor[chosen] for name, tensor in inputs.items()})
    loss = nn.functional.mse_loss(outputs, targets[chosen])
    loss.backward()
    optimizer.step()

    step = run.begin_step(item)
    for k in step.microbatches:
        with step.forward():
            outputs = run.state.model(**{name: t[indices(k)] for name, t in inputs.items()})
        step.backward(nn.functional.mse_loss(outputs, targets[indices(k)]), samples=MICROBATCH)
    result = step.optimize()
    run.end_step(item, result)
    assert result.loss / result.samples == pytest.approx(loss.item(), rel=1e-6)
    for p, q in zip(model.parameters(), run.state.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert (run.samples, run.epoch) == (2 * MICROBATCH, 2 * MICROBATCH / SAMPLES)
