"""The end of a launcher's process."""

import signal
import time
from pathlib import Path

import pytest

from hpc_absa.rundir import RunDir
from hpc_absa.supervisor.launchers import Command
from hpc_absa.supervisor.process import Exit, LauncherProcess

KILLED = "mpirun noticed that process rank 1 with PID 4711 on node far exited on signal 15 (Term)."


@pytest.mark.parametrize(
    ("code", "tail", "number"),
    [
        (0, (), None),
        (1, ("something else",), None),
        (143, ("-----", KILLED[:60], KILLED[60:]), signal.SIGTERM),
        (137, (KILLED.replace("15 (Term)", "9 (Killed)"),), signal.SIGKILL),
        (-signal.SIGUSR1, (), signal.SIGUSR1),
        (1, ("  File <frozen site>", "KeyboardInterrupt", "-----"), signal.SIGINT),
    ],
)
def test_the_signal_that_ended_the_ranks(code, tail, number):
    assert Exit(code, tail).fatal_signal() == number


def test_a_full_disk_does_not_block_the_ranks(tmp_path):
    """More lines than a pipe holds: if they were not read, the launcher would block."""
    shown: list[str] = []
    many = Command(("seq", "1", "30000"))
    process = LauncherProcess(many, Path("/dev/full"), None, shown.append)
    assert process.wait(RunDir(tmp_path), 60, lambda: None, lambda: True, True).code == 0
    assert len(shown) == 30000


@pytest.mark.parametrize(
    ("only_here", "phase_ended", "record", "killed"),
    [
        (True, False, '{"reason": "killed by SIGKILL"}', True),
        (True, True, '{"reason": "killed by SIGKILL"}', False),
        (False, False, '{"reason": "killed by SIGKILL"}', False),
        (True, False, '{"reason": "lower train.lr", "final": true}', False),
    ],
)
def test_after_a_failure_in_a_phase_the_other_ranks_are_killed(
    tmp_path, only_here, phase_ended, record, killed
):
    run = RunDir(tmp_path).create()
    command = Command(("sh", "-c", f"sleep 1 & echo '{record}' > {run.failure}; wait; sleep 0.1"))
    process = LauncherProcess(command, run.logs / "world-0-mpirun.log", None, print)
    begin = time.monotonic()
    ended = process.wait(run, 60, lambda: None, lambda: phase_ended, only_here)
    assert (time.monotonic() - begin < 0.9) == (ended.seconds > 0) == killed
    process.finish()
    assert process._process.returncode == 0


def test_where_the_kernel_lists_no_children_the_launcher_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(LauncherProcess, "_children", lambda self: None)
    run = RunDir(tmp_path).create()
    record = '{"reason": "killed by SIGKILL"}'
    command = Command(("sh", "-c", f"echo '{record}' > {run.failure}; sleep 1; exit 3"))
    process = LauncherProcess(command, run.logs / "world-0-mpirun.log", None, print)
    ended = process.wait(run, 60, lambda: None, lambda: False, only_here=True)
    assert (ended.code, ended.seconds) == (3, 0)


def test_a_process_that_keeps_the_output_open_does_not_keep_the_supervisor(tmp_path):
    process = LauncherProcess(Command(("true",)), tmp_path / "log", None, print)
    assert process._reader.daemon  # Python waits for other threads at its end
    process.finish()


def test_the_last_line_of_a_rank_is_its_exception():
    """Of what mpirun and horovodrun print, with the lines of two ranks mixed."""
    notice = ("-" * 74, "Primary job  terminated normally, but 1 process returned", "-" * 74)
    lines = ("starting", "[1,0]<stderr>:ImportErrorTraceback", "package.OwnError: no data", "x", "")
    assert Exit(1, (*lines, *notice)).last_line() == "package.OwnError: no data"
    assert (
        Exit(2, ("[1,1]<stderr>:lm.py: error: --lr", *notice)).last_line() == "lm.py: error: --lr"
    )
    pieces = "[1,0]<stderr>:ValueError[1,0]<stderr>:: [1,0]<stderr>:x[1,0]<stderr>:"
    assert Exit(1, (pieces, *notice)).last_line() == "ValueError: x"
    assert Exit(0, notice).last_line() == ""
