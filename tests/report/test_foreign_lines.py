"""Lines of other programs and fields without a value are passed over by every reader."""

import io
import json

import pytest
from rich.console import Console

from hpc_absa import replay, status
from hpc_absa.report.page import write_report
from hpc_absa.report.tensorboard import TensorBoardLog
from hpc_absa.rundir import RunDir
from hpc_absa.supervisor.chain import chain_status, link_events
from tests.mpi.jobs import write_job
from tests.report.synthetic import whole_run

KINDS = ("phase_start", "epoch", "decision", "checkpoint", "resize", "phase_end", "failure")
KINDS += ("progress", "save_failed", "host", "link", "done", "a_kind_of_the_future")


@pytest.fixture(name="run")
def _run(tmp_path):
    whole_run(tmp_path)
    write_job(tmp_path).rename(tmp_path / "job.toml")
    return RunDir(tmp_path)


def read_everything(run):
    now = status.status(run.path)
    status.render(now, Console(file=io.StringIO()))
    replay.render(replay.replay(run.path), Console(file=io.StringIO()))
    board = TensorBoardLog(run)
    board.update()
    board.close()
    list(link_events(run.log.read()))
    chain_status(run, run.log.read())
    return now


@pytest.mark.parametrize("value", [None, "text", [], {}, True, 1e400])
def test_fields_of_any_type_are_passed_over(run, value):
    """After the run's own events, one of each kind in which no field is as documented."""
    fields = {key for event in run.log.read() for key in event} - {"event", "phase"}
    with run.events.open("a") as file:
        for kind in KINDS:
            record = {"event": kind, "phase": 1, **dict.fromkeys(fields, value)}
            file.write(json.dumps(record).replace("Infinity", "1e400") + "\n")
    read_everything(run)
    write_report([run.path], None)


@pytest.mark.parametrize(
    "line",
    [
        b'{"event": "done"}',
        b'{"event": "done", "phase": null}',
        b'{"event": "done", "phase": true}',
        b'{"event": 5, "phase": 1}',
        b'{"level": "info", "message": "done"}',
        b'[1, "done"]',
        b"done \xff\xfe",
        b"NaN",
    ],
)
def test_lines_that_are_not_events_change_nothing(run, line):
    before = read_everything(run)
    run.events.write_bytes(run.events.read_bytes() + line + b"\n")
    after = read_everything(RunDir(run.path))
    assert (after.state, after.step, after.epoch) == (before.state, before.step, before.epoch)


def test_tensorboard_files_of_others_stay(run):
    run.tensorboard.mkdir()
    other = run.tensorboard / "events.out.tfevents.1.host.2.0"
    other.touch()
    for _ in range(2):  # the second writes the file again
        TensorBoardLog(run).close()
    assert len(list(run.tensorboard.iterdir())) == 2
    run.remove_files()
    assert list(run.tensorboard.iterdir()) == [other]
