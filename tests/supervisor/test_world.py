"""What a launcher's end says."""

import signal
from pathlib import Path

import pytest

from hpc_absa.supervisor.launchers import Command
from hpc_absa.supervisor.world import Ending, World

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
def test_the_signal_that_ended_a_world(code, tail, number):
    assert Ending(code, tail).fatal_signal() == number


def test_a_log_without_room_holds_nobody_up(tmp_path):
    """More lines than a pipe holds: were they not read, the world would wait for ever."""
    shown: list[str] = []
    many = Command(("seq", "1", "30000"))
    ending = World(many, Path("/dev/full"), None, shown.append).wait(tmp_path, 60, lambda: None)
    assert ending.exit_code == 0
    assert len(shown) == 30000
