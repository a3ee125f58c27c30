"""Files of a user's are never removed or replaced: only names that a run has, in a run's folder."""

import os
from pathlib import Path

import pytest

from hpc_absa.checkpoint.manager import verify
from hpc_absa.errors import RunLockedError, UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.files import replacing
from hpc_absa.rundir.lock import RunLock
from hpc_absa.rundir.paths import MARK
from hpc_absa.status import status
from hpc_absa.supervisor.run_state import clear


def a_run(folder):
    run = RunDir(folder).create()
    run.write_job("name = 'x'\n")
    run.log.append("phase_start", 1, ranks=1, step=0)
    (run.checkpoints / "step-0000000010-phase-001.h5").touch()
    (run.checkpoints / "step-0000000010-phase-001.0123abcd.0001-of-0002.shard").touch()
    run.rank_log(1, 0).touch()
    run.report.touch()
    return run


def content(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_full_disk_is_an_error_with_the_name_of_the_file(tmp_path):
    message = r"No space left on device: '.*job\.toml'"
    with pytest.raises(OSError, match=message), replacing(tmp_path / "job.toml"):
        Path("/dev/full").write_bytes(b"x")
    assert content(tmp_path) == []


def test_a_project_with_a_job_file_is_left_alone(tmp_path):
    (tmp_path / "job.toml").write_text("name = 'mine'\n")
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not a run directory"):
        clear(RunDir(tmp_path))
    with pytest.raises(UsageError, match="would change or remove that file"):
        RunDir(tmp_path).create()
    assert content(tmp_path) == ["job.toml", "thesis.tex"]
    assert (tmp_path / "job.toml").read_text() == "name = 'mine'\n"


def test_a_users_own_launch_file_is_left_alone(tmp_path):
    run = a_run(tmp_path)
    run.launch.write_text("mine\n")
    with pytest.raises(UsageError, match=r"it has a launch\.toml"):
        run.create()
    clear(run)
    assert content(tmp_path) == ["launch.toml", "lock"]
    run.launch.unlink()
    run.create().write_launch("name = 'x'\n")
    assert run.is_run
    clear(run)
    assert content(tmp_path) == ["lock"]


@pytest.mark.parametrize("name", ["events.jsonl", "stop"])
def test_a_users_own_file_is_not_written_to_or_removed(tmp_path, name):
    (tmp_path / name).write_text("mine\n")
    with pytest.raises(UsageError, match=f"it has a {name}, and is not a run directory"):
        RunDir(tmp_path).create()
    assert (tmp_path / name).read_text() == "mine\n"


def test_other_programs_events_make_no_run(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"event": "click"}\n')
    with pytest.raises(UsageError, match="not a run directory"):
        clear(RunDir(tmp_path))
    assert content(tmp_path) == ["events.jsonl"]


@pytest.mark.parametrize("linked", [False, True])
def test_a_run_is_cleared_and_the_users_files_in_it_stay(tmp_path, linked):
    folder = tmp_path / "run"
    run = a_run(folder)
    for name in ("notes.txt", "checkpoints/best.h5", "checkpoints/step-best.h5", "logs/mine.log"):
        (folder / name).write_text("mine")
    if linked:
        os.symlink(folder, tmp_path / "link")
        run = RunDir(tmp_path / "link")
    clear(run)
    kept = ["checkpoints/best.h5", "checkpoints/step-best.h5", "logs/mine.log", "notes.txt"]
    assert content(folder) == sorted([*kept, "lock"])


def test_a_linked_folder_of_a_run_is_not_emptied(tmp_path):
    run = a_run(tmp_path / "run")
    elsewhere = tmp_path / "elsewhere"
    run.checkpoints.rename(elsewhere)
    os.symlink(elsewhere, run.checkpoints)
    with pytest.raises(UsageError, match="a symbolic link, and --fresh removes nothing behind it"):
        clear(run)  # and not a run that continues from these checkpoints
    assert len(content(elsewhere)) == 2
    assert run.is_run


def test_a_file_that_cannot_go_yet_is_no_failure(tmp_path):
    """NFS keeps a removed open file under another name until it is closed."""
    run = a_run(tmp_path / "run")
    (run.logs / ".nfs0001").touch()
    clear(run)
    assert content(run.path) == ["lock", "logs/.nfs0001"]


def test_a_run_in_use_is_not_cleared(tmp_path):
    run = a_run(tmp_path / "run")
    lock = RunLock(run)
    lock.acquire()
    before = content(run.path)
    with pytest.raises(RunLockedError):
        clear(run)
    lock.release()
    assert content(run.path) == before


def test_a_run_that_ended_before_its_first_event_is_a_run(tmp_path):
    run = RunDir(tmp_path / "run").create()
    run.write_job("name = 'x'\n")
    assert run.job.read_text().startswith(MARK)
    clear(run)
    assert content(run.path) == ["lock"]
    assert not run.is_run


def test_a_packed_data_set_and_one_that_is_not_complete_are_removed(tmp_path):
    run = RunDir(tmp_path / "run").create()
    run.write_job("[data]\nname = 'my:images'\n")
    run.data.mkdir()
    packed = "my.images.h5"
    for name in (packed, f"{packed}.unreadable.txt", f".{packed}.0a1b2c3d.tmp"):
        (run.data / name).touch()
    for name in (f".{packed}.partial", f".{packed}.partial.jsonl", f"{packed}.partial"):
        (run.data / name).touch()
    clear(run)
    assert content(run.path) == ["data/my.images.h5.partial", "lock"]


def test_a_run_of_an_earlier_version_is_a_run(tmp_path):
    run = a_run(tmp_path / "run")
    run.job.write_text("name = 'x'\n")  # without the mark
    clear(run)
    assert content(run.path) == ["lock"]
    assert run.log.read() == []


@pytest.mark.parametrize(
    "name",
    ["step-best.h5", "step-last.h5", "best.h5", "step-9.h5", "step-0000000009-phase-001.h5.bak"],
)
def test_a_users_own_checkpoints_are_not_ours(tmp_path, name):
    run = RunDir(tmp_path).create()
    run.write_job("name = 'x'\n")
    ours = run.checkpoint(3, 1)
    for path in (ours, run.checkpoints / name):
        path.write_bytes(b"")
    assert run.checkpoint_files() == [ours]
    assert run.newest_step() == 3
    assert [verified.path for verified in verify(run.checkpoints)] == [ours]
    assert status(run.path).checkpoint.name == ours.name
