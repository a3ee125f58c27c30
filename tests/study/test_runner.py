"""Running the cells of a sweep, with a program that only writes the files of a run."""

import csv
import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from hpc_absa.errors import ExitStatus, RunLockedError, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import RunLock
from hpc_absa.study import sweep as sweeps
from hpc_absa.study import tables
from hpc_absa.study.runner import Progress, Runner, shares
from hpc_absa.study.sweep import StudyDir
from tests.study.test_sweep import BASE, SWEEP

PROGRAM = Path(__file__).with_name("fake_program.py")


class Stopping(Progress):
    """Sends this process a signal as soon as a cell has written an event."""

    def update(self, running):
        super().update(running)
        if any(self._study.run(cell).events.exists() for cell in running):
            os.kill(os.getpid(), signal.SIGINT)


class Study:
    """A sweep of six cells in a folder."""

    def __init__(self, folder, monkeypatch):
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        (folder / "base.toml").write_text(BASE)
        (folder / "sweep.toml").write_text(SWEEP)
        self.folder = folder
        self.behave()
        _, self.cells = sweeps.load(folder / "sweep.toml")
        self.study = StudyDir(folder / "out", self.cells)

    def behave(self, **cells):
        """Which cells do not simply end as done: see `fake_program.py`."""
        text = json.dumps({name.replace("_", "-"): value for name, value in cells.items()})
        (self.folder / "behaviour.json").write_text(text)

    def run(self, *, progress=Progress, side_by_side=2, retry=False, cells=None, terminal=False):
        self.output = io.StringIO()
        study = StudyDir(self.study.path, cells) if cells else self.study
        return Runner(
            study,
            progress(study, Console(file=self.output, width=200, force_terminal=terminal)),
            side_by_side=side_by_side,
            retry=retry,
            program=(sys.executable, str(PROGRAM), str(self.folder / "behaviour.json")),
        ).run()

    def starts(self):
        """Cells started since the previous call, with their cores."""
        path = self.folder / "starts.txt"
        lines = path.read_text().splitlines() if path.exists() else []
        path.write_text("")
        return dict(line.split(" ", 1) for line in lines)

    def states(self):
        return [self.study.state(cell) for cell in self.cells]


@pytest.fixture(name="study")
def _study(tmp_path, monkeypatch):
    return Study(tmp_path, monkeypatch)


def test_every_cell_is_run_once(study):
    assert study.states() == ["new"] * 6
    assert study.run() == ExitStatus.OK
    assert study.states() == ["done"] * 6
    assert study.starts().keys() == {cell.name for cell in study.cells}
    assert len(read(study.study.tables / "time.csv")) == 4
    assert "bl-32-seed0: 90.00 % after 50 steps" in study.output.getvalue()
    assert study.run() == ExitStatus.OK
    assert study.starts() == {}
    assert "6 of 6 cells were done before" in study.output.getvalue()


def test_bars_on_a_terminal_count_epochs(study):
    assert study.run(terminal=True, cells=study.cells[:2]) == ExitStatus.OK
    assert "8.0 of 8 epochs" in study.output.getvalue()


def test_failed_cell_does_not_stop_others_and_runs_again_with_retry(study):
    study.behave(bl_32_seed1="fail", absa_128_seed0="refuse")
    assert study.run() == ExitStatus.FAILED
    assert study.states() == ["done", "failed", "done", "done", "failed", "done"]
    assert "[2/6] bl-32-seed1: failed: something is wrong; log: " in study.output.getvalue()
    assert study.study.failures()["absa-128-seed0"].exit_status == 2
    study.starts()
    study.behave()
    assert study.run() == ExitStatus.FAILED
    assert study.starts() == {}
    output = study.output.getvalue()
    assert "bl-32-seed1: failed before: something is wrong; --retry runs it again" in output
    assert study.run(retry=True) == ExitStatus.OK
    assert study.starts().keys() == {"bl-32-seed1", "absa-128-seed0"}
    assert study.states() == ["done"] * 6
    assert study.study.failures() == {}


def test_a_cell_that_is_stopped_while_it_starts_has_not_failed(study):
    study.behave(bl_32_seed0="start")
    assert study.run(progress=Stopping, side_by_side=1) == ExitStatus.STOPPED
    assert study.states() == ["unfinished", *["new"] * 5]
    assert study.study.failures() == {}


def test_signal_stops_the_cells_and_the_same_command_continues(study):
    study.behave(bl_32_seed0="wait")
    before = signal.getsignal(signal.SIGINT)
    assert study.run(progress=Stopping, side_by_side=1) == ExitStatus.STOPPED
    assert signal.getsignal(signal.SIGINT) is before
    assert study.states() == ["unfinished", *["new"] * 5]
    assert "stopped after 1 epochs, saved" in study.output.getvalue()
    assert study.run() == ExitStatus.OK
    assert study.states() == ["done"] * 6


def test_a_cell_that_ended_after_fewer_epochs_is_not_done(study):
    assert study.run() == ExitStatus.OK
    study.study.run(study.cells[0]).log.append("done", 1, steps=1, epochs=0)
    assert study.states() == ["unfinished", *["done"] * 5]


def test_cells_save_and_stop_when_compare_is_killed(study):
    study.behave(bl_32_seed0="wait")
    child = os.fork()
    if child == 0:
        study.run(side_by_side=1)
        os._exit(0)
    log = study.study.run(study.cells[0]).log
    wait_for(lambda: "checkpoint" in kinds(log))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    wait_for(lambda: kinds(log)[-1] == "phase_end")
    assert study.run() == ExitStatus.OK
    assert study.states() == ["done"] * 6


def kinds(log):
    return [event["event"] for event in log.read()]


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_cells_that_run_at_the_same_time_share_the_cores(study):
    cores = sorted(os.sched_getaffinity(0))
    study.behave(bl_32_seed0="together", bl_32_seed1="together")
    assert study.run(side_by_side=2) == ExitStatus.OK
    starts = study.starts()
    used = [starts["bl-32-seed0"], starts["bl-32-seed1"]]
    assert sorted(used) == sorted(str(share) for share in shares(cores, 2))


@pytest.mark.parametrize(
    ("cores", "count", "parts"),
    [
        ([0, 1], 1, [[0, 1]]),
        ([0, 1], 2, [[0], [1]]),
        ([3, 5, 8], 2, [[3], [5, 8]]),
        ([0, 1], 3, [[0], [1], [0]]),
    ],
)
def test_cores_are_divided(cores, count, parts):
    assert shares(cores, count) == parts


def test_second_compare_on_the_same_folder_is_refused(study):
    study.study.path.mkdir()
    lock = RunLock(RunDir(study.study.path))
    lock.acquire()
    with pytest.raises(RunLockedError, match="in use by process"):
        study.run()
    lock.release()


def test_cell_started_with_another_job_is_refused(study):
    assert study.run(cells=study.cells[:1]) == ExitStatus.OK
    _, others = sweeps.load(study.folder / "sweep.toml", ("train.lr=0.5",))
    with pytest.raises(UsageError, match=r"bl-32-seed0.*train\.lr = 0\.05 there, 0\.5 here"):
        study.run(cells=others)


# The tables


def read(path):
    return list(csv.reader(path.open()))


def test_tables_are_means_over_the_seeds_that_are_done(study):
    study.behave(absa_128_seed1="fail")
    study.run()
    assert {path.name for path in study.study.tables.iterdir()} == {
        f"{name}.{suffix}"
        for name in ("accuracy", "time", "growths")
        for suffix in ("md", "csv", "tex", "html")
    }
    heads, small, large = read(study.study.tables / "accuracy.csv")
    assert heads[:4] == ["batch", "BL accuracy %", "BL accuracy % std", "BL accuracy % n"]
    assert [float(value) for value in small[:4]] == pytest.approx([32, 91, 2**0.5, 2])
    row = dict(zip(heads, large, strict=True))
    assert float(row["ABSA accuracy %"]) == pytest.approx(90)
    assert row["ABSA accuracy % n"] == "1"
    markdown = (study.study.tables / "accuracy.md").read_text()
    assert "91.00 ± 1.41" in markdown
    assert "1 run without a result not included" in markdown
    times = read(study.study.tables / "time.csv")
    assert [row[0] for row in times] == ["method", "BL 32", "BL 128", "ABSA"]
    page = (study.study.tables / "time.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "BL 32" in page


def test_tables_of_the_users_are_not_replaced(study):
    own = study.study.tables / "accuracy.csv"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    with pytest.raises(UsageError, match="tables: exists and is not of a sweep"):
        study.run()
    assert own.read_text() == "mine"


def test_tables_are_empty_before_any_cell_is_done(study):
    made = tables.of(study.study)
    assert made["time"].rows == ()
    assert "6 runs without a result" in made["accuracy"].to_markdown()


@pytest.mark.parametrize(
    ("settings", "published"),
    [
        (("data.name=cifar10", "model.name=resnet18-cifar"), "accuracy"),
        (("data.name=imagenet", "model.name=resnet18"), "time"),
        (("data.name=cifar10", "model.name=resnet8"), None),
    ],
)
def test_published_numbers_are_shown_for_the_published_jobs(study, settings, published):
    base = 256 if "data.name=imagenet" in settings else 128
    sizes = (f"train.microbatch={base}", f"schedule.base_batch={base}")
    text = SWEEP.replace("max_batch = [32]", "max_batch = [256]").replace("[128]", "[2560]")
    (study.folder / "sweep.toml").write_text(text)
    _, cells = sweeps.load(study.folder / "sweep.toml", (*settings, *sizes))
    made = tables.of(StudyDir(study.study.path, cells))
    assert ("published" in made["accuracy"].to_markdown()) == (published == "accuracy")
    assert ("published" in made["time"].to_markdown()) == (published == "time")
    if published == "accuracy":
        assert "35156" in made["accuracy"].to_csv()
    if published == "time":
        assert "ABSA 66k iterations, 70.2 %" in made["time"].to_markdown()
