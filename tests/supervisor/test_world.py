"""What a launcher's end says."""

import signal

import pytest

from hpc_absa.supervisor.world import Ending

KILLED = "mpirun noticed that process rank 1 with PID 4711 on node far exited on signal 15 (Term)."


@pytest.mark.parametrize(
    ("code", "tail", "number"),
    [
        (0, (), None),
        (1, ("something else",), None),
        (143, ("-----", KILLED[:60], KILLED[60:]), signal.SIGTERM),
        (137, (KILLED.replace("15 (Term)", "9 (Killed)"),), signal.SIGKILL),
        (-signal.SIGUSR1, (), signal.SIGUSR1),
    ],
)
def test_the_signal_that_ended_a_world(code, tail, number):
    assert Ending(code, tail).fatal_signal() == number
