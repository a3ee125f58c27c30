"""`hpc-absa list`: the runs in a folder, also in folders below it, and nothing else."""

import json
import os

import pytest

from hpc_absa.cli.listing import list_runs
from hpc_absa.errors import UsageError
from hpc_absa.report.compare import find_runs
from hpc_absa.rundir import RunDir
from tests.supervisor.digits import PATH


@pytest.fixture(name="runs")
def _runs(tmp_path):
    """A finished run, one of a script that has not begun, a sweep's run, and other folders."""
    done = RunDir(tmp_path / "done").create()
    done.write_job(PATH.read_text())
    done.log.append("phase_start", 1, ranks=2, global_batch=32, step=0, samples=0, epoch=0)
    done.log.append("done", 1, steps=7, epochs=1, test_accuracy=None)
    RunDir(tmp_path / "a script").create().write_launch('name = "x"\n')
    RunDir(tmp_path / "sweep" / "bl-32").create().write_job(PATH.read_text())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "job.toml").write_text('name = "mine"\n')
    return tmp_path


def test_json_has_the_status_of_each_run(runs, capsys):
    assert list_runs(runs, as_json=True) == 0
    listed = json.loads(capsys.readouterr().out)["runs"]
    assert [(run["path"], run["state"]) for run in listed] == [
        (str(runs / "a script"), "not started"),
        (str(runs / "done"), "done"),
        (str(runs / "sweep" / "bl-32"), "not started"),
    ]


def test_the_table_has_a_line_for_each_run(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    list_runs(runs)
    out = capsys.readouterr().out
    assert sum("not started" in line for line in out.splitlines()) == 2
    assert "bl-32" in out
    assert "mine" not in out


def test_a_run_directory_lists_itself(runs, capsys):
    assert list(find_runs(runs / "done")) == [runs / "done"]
    list_runs(runs / "mine")
    assert capsys.readouterr().out == f"{runs / 'mine'}: no runs\n"
    with pytest.raises(UsageError, match="no such folder"):
        list_runs(runs / "none")


def test_a_folder_that_cannot_be_read_is_left_out(runs, monkeypatch):
    scandir = os.scandir

    def denied(path):  # permissions do not hold for root
        if str(path).endswith("sweep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", denied)
    assert list(find_runs(runs)) == [runs / "a script", runs / "done"]
    with pytest.raises(PermissionError):
        list(find_runs(runs / "sweep"))
