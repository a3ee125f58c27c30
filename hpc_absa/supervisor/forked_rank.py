"""What mpirun starts for a rank on this host; the rank is its child, or the fork server's.

Called with the server's address (empty: none), the file for a failure, and the command of a rank.
Signals are passed on to the rank, and when one of the two ends, so does the other. A rank that is
killed is recorded at once: mpirun reports it after it has ended the others. One that SIGSTOP has
stopped is recorded after `STOPPED_SECONDS`, and killed. This process imports nothing else of ours,
so that it starts in 20 ms (`python -I -S`).
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
STOPPED_SECONDS = 2.0
CHECKS = 4
"""Checks of a stopped rank within `STOPPED_SECONDS`. If all processes are suspended and continued,
only one check is late, and the rank runs before the next. A debugger's stops are not reported to a
parent; SIGTSTP, which Slurm sends first, is not counted."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    address, failure, *words = sys.argv[1:]
    connection = socket.socket(socket.AF_UNIX)
    forked = False
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until `watch` can pass them on
    if address:
        with contextlib.suppress(OSError):
            connection.connect(f"\0{address}")
            forked = request_rank(connection, words)
    status = watch_forked(connection, failure) if forked else watch_executed(words, failure)
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if not number:
        os._exit(os.waitstatus_to_exitcode(status))
    if number not in SIGNALS:
        record(failure, f"killed by {signal.Signals(number).name}", 128 + number)
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


def watch_forked(connection: socket.socket, failure: str) -> int:
    """The wait status of a rank of the server, which kills its ranks if it is killed."""

    def change() -> int:
        status = b""
        with contextlib.suppress(OSError):
            status = connection.recv(4)
        return int.from_bytes(status, "big") if len(status) == 4 else signal.SIGKILL

    return watch(change, lambda number: connection.send(bytes([number])), failure)


def watch_executed(words: list[str], failure: str) -> int:
    """Run the rank as a child; its wait status."""
    import ctypes

    parent, prctl = os.getpid(), ctypes.CDLL(None).prctl
    try:
        pid = os.fork()
    except OSError as error:
        record(failure, f"no process could be started for it: {error.strerror}", 1)
        os._exit(1)
    if pid == 0:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        try:
            if os.getppid() == parent:
                os.setpgid(0, 0)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
                os.execv(words[0], words)
        finally:
            os._exit(127)
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)

    def change() -> int:
        return os.waitpid(pid, os.WUNTRACED | os.WCONTINUED)[1]

    return watch(change, lambda number: os.killpg(pid, number), failure)


def watch(change: Callable[[], int], send: Callable[[int], object], failure: str) -> int:
    """Pass signals on to a rank until its end.

    Args:
        change: waits until the rank is stopped, continued or ended; returns its wait status.
        send: sends it a signal.
        failure: the file for a failure.

    Returns:
        Its last wait status.
    """
    checks = 0

    def check(number: int, frame: object) -> None:
        nonlocal checks
        checks += 1
        if checks == CHECKS:
            record(failure, f"stopped by SIGSTOP for {STOPPED_SECONDS:g} s", 128 + signal.SIGSTOP)
            with contextlib.suppress(OSError):
                send(signal.SIGKILL)

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(OSError):
            send(number)

    signal.signal(signal.SIGALRM, check)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    while os.WIFSTOPPED(status := change()) or os.WIFCONTINUED(status):
        checks = 0
        stopped = os.WIFSTOPPED(status) and os.WSTOPSIG(status) == signal.SIGSTOP
        seconds = STOPPED_SECONDS / CHECKS if stopped else 0
        signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    return status


def record(failure: str, reason: str, exit_code: int) -> None:
    """Leave the file for the supervisor, if no rank has (`training.rank`)."""
    import json

    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    content = {"reason": reason, "rank": rank, "host": os.uname().nodename}
    content |= {"exit_code": exit_code}
    with contextlib.suppress(OSError), open(failure, "x") as file:
        json.dump(content, file)


if __name__ == "__main__":
    main()
