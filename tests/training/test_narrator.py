"""What is told once a checkpoint is durable."""

import io

import pytest

from hpc_absa import events
from hpc_absa.checkpoint import Published
from hpc_absa.rundir import RunDir
from hpc_absa.training.narrator import Narrator


@pytest.fixture(name="run")
def _run(tmp_path):
    return RunDir(tmp_path).create()


@pytest.fixture(name="narrator")
def _narrator(run):
    return Narrator(run, 0, io.StringIO())


def told(run):
    return [e.get("epoch", e["event"]) for e in events.read(run.events)]


def published(run):
    return Published(run.checkpoint(1, 1), 10, 0.1)


def test_a_save_begun_while_another_is_in_flight_tells_nothing_twice(run, narrator):
    narrator.emit_when_saved("epoch", 1, epoch=1)
    first = narrator.on_saved(1, 10, 320)
    narrator.emit_when_saved("epoch", 1, epoch=2)
    second = narrator.on_saved(1, 20, 640)
    first(published(run))
    assert told(run) == [1, "checkpoint"]
    second(published(run))
    assert told(run) == [1, "checkpoint", 2, "checkpoint"]


def test_what_waited_for_a_save_that_failed_is_told_with_the_next(run, narrator):
    narrator.emit_when_saved("epoch", 1, epoch=1)
    narrator.on_saved(1, 10, 320)
    narrator.emit_when_saved("epoch", 1, epoch=2)
    narrator.on_saved(1, 20, 640)(published(run))
    assert told(run) == [1, 2, "checkpoint"]
