"""Events that wait for a checkpoint: each written once, in order, never before it is on disk."""

import io
from pathlib import Path

import pytest

from hpc_absa.checkpoint import Published
from hpc_absa.rundir import RunDir
from hpc_absa.training import log as training_log
from hpc_absa.training.log import EventLogger, ProgressMeter

ON_DISK = Published(Path("step-1.h5"), 100, 0.5)


@pytest.fixture(name="run")
def _run(tmp_path):
    return RunDir(tmp_path).create()


@pytest.fixture(name="log")
def _log(run):
    return EventLogger(run, 0, io.StringIO())


def kinds(run):
    return [e["event"] for e in run.log.read()]


def test_events_wait_for_the_checkpoint_that_contains_their_state(run, log):
    log.emit_when_saved("epoch", 1, step=1)
    saved = log.on_saved(1, 1, 32)
    log.emit_when_saved("decision", 1, step=2)
    assert kinds(run) == []
    saved(ON_DISK)
    assert kinds(run) == ["epoch", "checkpoint"]
    log.on_saved(1, 2, 64)(ON_DISK)
    assert kinds(run) == ["epoch", "checkpoint", "decision", "checkpoint"]


def test_a_save_that_starts_before_the_previous_one_is_on_disk(run, log):
    log.emit_when_saved("epoch", 1, step=1)
    first = log.on_saved(1, 1, 32)
    log.emit_when_saved("decision", 1, step=2)
    second = log.on_saved(1, 2, 64)
    first(ON_DISK)
    second(ON_DISK)
    assert kinds(run) == ["epoch", "checkpoint", "decision", "checkpoint"]


def test_events_of_a_failed_save_are_written_with_the_next_one(run, log):
    log.emit_when_saved("epoch", 1, step=1)
    log.on_saved(1, 1, 32)  # never called: that save failed
    log.save_failed("the disk is full")
    log.emit_when_saved("decision", 1, step=2)
    log.on_saved(1, 2, 64)(ON_DISK)
    assert kinds(run) == ["save_failed", "epoch", "decision", "checkpoint"]


def test_only_rank_0_writes(run):
    console = io.StringIO()
    log = EventLogger(run, 1, console)
    log.print("hello")
    log.emit("epoch", 1)
    log.emit_when_saved("decision", 1)
    log.save_failed("the disk is full")
    assert console.getvalue() == ""
    assert kinds(run) == []


def test_progress_is_due_each_second_at_first_and_every_ten_on_long_runs(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(training_log.time, "monotonic", lambda: now[0])
    meter, times = ProgressMeter(), []
    for second in range(4 * 3600):
        now[0] = float(second)
        meter.begin_step()
        now[0] += 0.5
        meter.end_step(20.0, 10.0, 10)
        if meter.due():
            times.append(second)
            assert meter.take() == {"train_loss": 2.0, "samples_per_second": 20.0}
    assert times[:3] == [1, 2, 3]
    assert times[-1] - times[-2] == 10
    assert len(times) < 3500
