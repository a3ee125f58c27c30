"""What mpirun starts for a rank on this host; the rank is its child, or the fork server's.

Called with the server's address (empty: none), the file for a failure, and the command of a rank.
Signals are passed on to the rank, and when one of the two ends, so does the other. A rank that is
killed is recorded at once: mpirun reports it after it has ended the others. It imports nothing else
of ours, so that it starts in 20 ms (`python -I -S`).
"""

import contextlib
import marshal
import os
import signal
import socket
import sys
from collections.abc import Callable

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""That ask for a stop, and are passed on."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    address, failure, *words = sys.argv[1:]
    connection = socket.socket(socket.AF_UNIX)
    forked = False
    if address:
        with contextlib.suppress(OSError):
            connection.connect(f"\0{address}")
            forked = request_rank(connection, words)
    status = wait(connection) if forked else execute(words)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if not number:
        os._exit(os.waitstatus_to_exitcode(status))
    if number not in SIGNALS:
        record(failure, number)
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)  # for the launcher


def request_rank(connection: socket.socket, words: list[str]) -> bool:
    """Ask for a process with this one's surroundings that runs `words`; whether there is one."""
    mask = os.umask(0)
    os.umask(mask)
    affinity = list(os.sched_getaffinity(0))
    content = marshal.dumps((words, dict(os.environ), os.getcwd(), mask, affinity))
    socket.send_fds(connection, [len(content).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(content)
    return bool(connection.recv(1))


def wait(connection: socket.socket) -> int:
    """The wait status of a rank of the server, which kills its ranks if it is killed."""
    pass_on(lambda number: connection.send(bytes([number])))
    status = b""
    with contextlib.suppress(OSError):
        status = connection.recv(4)
    return int.from_bytes(status, "big") if len(status) == 4 else signal.SIGKILL


def execute(words: list[str]) -> int:
    """Run the rank as a child; its wait status."""
    import ctypes

    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl
    pid = os.fork()
    if pid == 0:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        try:
            if os.getppid() == parent:
                os.setpgid(0, 0)
                os.execv(words[0], words)
        finally:
            os._exit(127)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)
    pass_on(lambda number: os.killpg(pid, number))
    return os.waitpid(pid, 0)[1]


def pass_on(send: Callable[[int], object]) -> None:
    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(OSError):
            send(number)

    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)


def record(failure: str, number: int) -> None:
    """Leave the file for the supervisor, if no rank has (`training.rank`)."""
    import json

    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    content = {"reason": f"killed by {signal.Signals(number).name}", "rank": rank}
    content |= {"host": os.uname().nodename, "exit_code": 128 + number}
    with contextlib.suppress(OSError), open(failure, "x") as file:
        json.dump(content, file)


if __name__ == "__main__":
    main()
