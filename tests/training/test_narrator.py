"""Events that wait for a checkpoint: each written once, in order, never before it is durable."""

import io
from pathlib import Path

import pytest

from hpc_absa.checkpoint import Published
from hpc_absa.rundir import RunDir
from hpc_absa.training.narrator import Narrator

DURABLE = Published(Path("step-1.h5"), 100, 0.5)


@pytest.fixture(name="run")
def _run(tmp_path):
    return RunDir(tmp_path).create()


def kinds(run):
    return [e["event"] for e in run.log.read()]


def test_events_wait_for_the_checkpoint_that_holds_them(run):
    narrator = Narrator(run, 0, io.StringIO())
    narrator.emit_when_saved("epoch", 1, step=1)
    saved = narrator.on_saved(1, 1, 32)
    narrator.emit_when_saved("decision", 1, step=2)
    assert kinds(run) == []
    saved(DURABLE)
    assert kinds(run) == ["epoch", "checkpoint"]
    narrator.on_saved(1, 2, 64)(DURABLE)
    assert kinds(run) == ["epoch", "checkpoint", "decision", "checkpoint"]


def test_a_save_that_is_asked_for_while_the_one_before_is_in_flight(run):
    narrator = Narrator(run, 0, io.StringIO())
    narrator.emit_when_saved("epoch", 1, step=1)
    first = narrator.on_saved(1, 1, 32)
    narrator.emit_when_saved("decision", 1, step=2)
    second = narrator.on_saved(1, 2, 64)  # the first is written only now
    first(DURABLE)
    second(DURABLE)
    assert kinds(run) == ["epoch", "checkpoint", "decision", "checkpoint"]


def test_what_a_failed_save_would_have_told_the_next_one_tells(run):
    narrator = Narrator(run, 0, io.StringIO())
    narrator.emit_when_saved("epoch", 1, step=1)
    narrator.on_saved(1, 1, 32)  # never called: that save failed
    narrator.save_failed("no room")
    narrator.emit_when_saved("decision", 1, step=2)
    narrator.on_saved(1, 2, 64)(DURABLE)
    assert kinds(run) == ["save_failed", "epoch", "decision", "checkpoint"]


def test_only_rank_0_speaks(run):
    people = io.StringIO()
    narrator = Narrator(run, 1, people)
    narrator.say("hello")
    narrator.emit("epoch", 1)
    narrator.emit_when_saved("decision", 1)
    narrator.save_failed("no room")
    assert people.getvalue() == ""
    assert kinds(run) == []
