"""The measurements of a run as a table: where each one is, and nothing that a crash undid."""

import csv
import math
import os
import sys
from types import SimpleNamespace

import pytest

from hpc_absa.errors import UsageError
from hpc_absa.report import trackers
from hpc_absa.report.curves import curves
from hpc_absa.report.history import load
from hpc_absa.report.scalars import MARK, Clock, export, rows
from hpc_absa.rundir.files import require_replaceable
from tests.report.synthetic import START, Log, whole_run


@pytest.fixture(name="history", scope="module")
def _history(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    whole_run(folder)
    return load(folder)


def progress(log, seconds=1.0, **fields):
    """A `progress` event after 10 steps."""
    log.step += 10
    log.samples += 10 * log.batch
    defaults = {"epoch": log.epoch, "step": log.step, "samples": log.samples}
    defaults |= {"train_loss": 1.0, "samples_per_second": 320.0, "grad_norm": 2.0, "memory": 1e9}
    return log.tick(seconds).event("progress", **{**defaults, **fields})


def test_rows_are_in_the_order_of_training_without_what_a_crash_undid(history):
    table = rows(history)
    steps = [row["step"] for row in table]
    assert steps == sorted(steps)
    assert [row["epoch"] for row in table if row["event"] == "epoch"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert 0.94 not in [row.get("test_accuracy") for row in table]  # undone
    (first,) = [row for row in table if row["event"] == "epoch" and row["epoch"] == 1]
    assert first["train_loss"] == pytest.approx(0.6)


def test_seconds_and_rank_hours_add_up_to_the_whole_run(history):
    clock = Clock(history.attempts)
    assert clock.at(START - 100) == (0.0, 0.0)
    seconds, rank_seconds = clock.at(history.last_event)
    assert seconds == pytest.approx(history.wall)
    by_ranks = (part.attempt.ranks * part.wall for part in history.attempts)
    assert rank_seconds == pytest.approx(sum(by_ranks))
    times = [row["seconds"] for row in rows(history)]
    assert times == sorted(times)


def test_pauses_are_not_counted(tmp_path):
    log = Log(tmp_path).start().train_epoch().save().end("stopped", 50, comp=4.0)
    log.tick(1000).start().train_epoch()
    table = [row for row in rows(load(tmp_path)) if row["event"] == "epoch"]
    assert [row["seconds"] for row in table] == pytest.approx([4.0, 8.1])
    assert table[-1]["rank_hours"] == pytest.approx(8.1 / 3600)


def test_csv_has_all_measurements_of_several_runs(history, tmp_path):
    log = progress(Log(tmp_path / "other").start())
    log.train_epoch(metrics={"f1": 0.5})
    path = tmp_path / "out" / "scalars.csv"
    count = export({"one": history, "two": load(tmp_path / "other")}, path)
    with path.open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == count
    assert [*table[0]][:4] == ["run", "event", "time", "phase"]
    assert {row["run"] for row in table} == {"one", "two"}
    assert [row["grad_norm"] for row in table if row["event"] == "progress"] == ["2.0"]
    assert [row["metrics.f1"] for row in table if row["metrics.f1"]] == ["0.5"]
    require_replaceable(path, "--scalars", MARK)  # by the next one


def test_parquet_has_the_same_rows(history, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    count = export({"run": history}, tmp_path / "scalars.parquet")
    table = parquet.read_table(tmp_path / "scalars.parquet")
    assert table.num_rows == count
    require_replaceable(tmp_path / "scalars.parquet", "--scalars", MARK)
    assert math.fsum(v for v in table["test_accuracy"].to_pylist() if v) == pytest.approx(7.147)


def test_another_kind_of_file_is_a_usage_error(history, tmp_path):
    with pytest.raises(UsageError, match=r"\.csv or \.parquet"):
        export({"run": history}, tmp_path / "scalars.xls")


def test_a_long_log_is_merged_on_the_page_and_keeps_its_largest_gradient(tmp_path, monkeypatch):
    monkeypatch.setattr("hpc_absa.report.curves.PROGRESS_POINTS", 100)
    log = Log(tmp_path).start()
    for n in range(1000):
        progress(log, grad_norm=50.0 if n == 501 else 1.0, train_loss=float(n))
    (run,) = curves({"run": load(tmp_path)}, {})["runs"]
    indices, losses = run["y"]["train_loss"]
    assert len(indices) == 100
    assert losses[0] == 4.5  # the mean of ten
    assert max(run["y"]["grad_norm"][1]) == 50.0
    assert run["x"]["step"][indices[-1]] == log.step


def test_curves_of_batch_and_ranks_keep_only_their_changes(history):
    (run,) = curves({"run": history}, {})["runs"]
    _, values = run["y"]["global_batch"]
    assert sorted(set(values)) == [32, 64, 128, 256]
    assert len(values) <= 8
    assert values == sorted(values)
    assert [run["x"]["epoch"][i] for i in run["marks"]["grow"]] == [2, 4, 6]


@pytest.mark.parametrize("tracker", ["wandb", "trackio"])
def test_trackers_get_each_measurement_at_its_step(history, tmp_path, monkeypatch, tracker):
    calls = []
    fake = SimpleNamespace(
        init=lambda **options: calls.append(("init", options)),
        log=lambda numbers, step: calls.append((step, numbers)),
        finish=lambda: calls.append(("finish", {})),
        __spec__=object(),
    )
    monkeypatch.setitem(sys.modules, tracker, fake)
    monkeypatch.setenv("TRACKIO_DIR", "")
    trackers.write(tracker, {"one": history}, tmp_path / "out")
    (first, options), *logged, (last, _) = calls
    assert (first, last) == ("init", "finish")
    assert options["name"] == "one"
    assert options["config"]["schedule"]["alpha"] == 2.0
    assert [step for step, _ in logged] == sorted(step for step, _ in logged)
    assert [n["test_accuracy"] for _, n in logged if "test_accuracy" in n][-1] == 0.974
    used = options.get("dir") or os.environ["TRACKIO_DIR"]
    assert used == str(tmp_path / "out")


def test_a_tracker_that_is_not_installed_is_named(history, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'hpc-absa\[wandb\]'"):
        trackers.write("wandb", {"one": history}, tmp_path)
