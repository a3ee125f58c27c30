"""The fork server's process: imports what ranks need, once, and forks a rank for each request.

    python -m hpc_absa.supervisor.forking DESCRIPTOR RUN_DIR MODULE...

`forked_rank.py` sends the requests. A rank has its requester's environment, folder, standard
streams and cores, and is killed if the requester or this server is. Before the fork nothing has
used MPI, a GPU or a thread.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import marshal
import os
import runpy
import selectors
import signal
import socket
import struct
import sys

from hpc_absa.allocation import launcher_rank
from hpc_absa.parent_death import end_with_parent
from hpc_absa.supervisor.forked_rank import SIGNALS

PR_SET_NAME = 15
LIBC = ctypes.CDLL(None)
NAME = "absa-rank-"
"""Of a rank's process in `ps`, with its number; its command there is the server's."""
FROZEN = "<frozen runpy>"
REQUEST_SECONDS = 10.0
HEADER = 4
"""Bytes before a request: the number of bytes of it."""


class Server:
    def __init__(self, listener: socket.socket) -> None:
        self._pid, self._listener = os.getpid(), listener
        self._ranks: dict[int, socket.socket] = {}
        """The connection of the requester of each running rank, by process id."""
        self._selector = selectors.DefaultSelector()
        self._wakeup, self._wakeup_writer = socket.socketpair()
        for end in (self._wakeup, self._wakeup_writer):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        # A scheduler may signal all processes of a job: that is for the ranks to act on.
        self._handlers = {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}

    def serve(self) -> list[str] | None:
        """Fork ranks until the supervisor has ended, and the last rank; the command, in a rank."""
        for source in (self._listener, self._wakeup, sys.stdin.buffer):
            self._selector.register(source, selectors.EVENT_READ)
        supervised = True
        while supervised or self._ranks:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    if words := self._accept():
                        return words
                elif key.fileobj is self._wakeup:
                    self._wakeup.recv(4096)
                    self._report()
                elif key.fileobj is sys.stdin.buffer:
                    supervised = False
                    self._selector.unregister(sys.stdin.buffer)
                elif key.data in self._ranks:
                    self._forward(key.data)
        return None

    def _accept(self) -> list[str] | None:
        """Fork a rank for one requester; in the rank, its command."""
        connection, _ = self._listener.accept()
        try:
            content, streams = receive(connection)
        except (OSError, ValueError):
            connection.close()
            return None
        try:
            pid = os.fork()
        except OSError:  # too many processes, no memory: the requester executes the rank
            pid = -1
        if pid == 0:
            connection.close()
            return self._become_rank(streams, *marshal.loads(content))
        for stream in streams:
            os.close(stream)
        if pid < 0:
            connection.close()
            return None
        with contextlib.suppress(OSError):
            os.setpgid(pid, pid)
        self._ranks[pid] = connection
        self._selector.register(connection, selectors.EVENT_READ, pid)
        with contextlib.suppress(OSError):
            connection.send(b"+")
        return None

    def _forward(self, pid: int) -> None:
        """Pass signals on to a rank, which is killed when its requester has ended."""
        try:
            numbers = self._ranks[pid].recv(64)
        except OSError:
            numbers = b""
        if not numbers:
            self._selector.unregister(self._ranks[pid])
        for number in numbers or [signal.SIGKILL]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, number)

    def _report(self) -> None:
        """Tell the requesters of ranks that were stopped, continued or have ended."""
        with contextlib.suppress(ChildProcessError):
            while (changed := os.waitpid(-1, os.WNOHANG | os.WUNTRACED | os.WCONTINUED))[0]:
                pid, status = changed
                connection = self._ranks[pid]
                with contextlib.suppress(OSError):
                    connection.send(status.to_bytes(4, "big"))
                if os.WIFSTOPPED(status) or os.WIFCONTINUED(status):
                    continue
                del self._ranks[pid]
                with contextlib.suppress(KeyError):
                    self._selector.unregister(connection)
                connection.close()

    def _become_rank(
        self,
        streams: list[int],
        words: list[str],
        environment: dict[str, str],
        folder: str,
        mask: int,
        cores: list[int],
    ) -> list[str]:
        """In the child: have the surroundings of the requester; returns the command."""
        end_with_parent(signal.SIGKILL)
        if os.getppid() != self._pid:
            os._exit(1)
        os.setpgid(0, 0)
        signal.set_wakeup_fd(-1)
        for caught, handler in {signal.SIGCHLD: signal.SIG_DFL, **self._handlers}.items():
            signal.signal(caught, handler)
        self._selector.close()
        for kept in (self._listener, self._wakeup, self._wakeup_writer, *self._ranks.values()):
            kept.close()
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
            os.close(descriptor)
        open_standard_streams(bool(environment.get("PYTHONUNBUFFERED")))
        os.chdir(folder)
        os.umask(mask)
        os.sched_setaffinity(0, cores)
        os.environ.clear()
        os.environ.update(environment)
        LIBC.prctl(PR_SET_NAME, f"{NAME}{launcher_rank(environment)}".encode())
        if numpy := sys.modules.get("numpy"):
            numpy.random.seed()  # the standard library's random numbers are seeded at a fork
        return words


def open_standard_streams(unbuffered: bool) -> None:
    """As the interpreter does at its start: these may be terminals, or files that can seek."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        stream = open(  # noqa: SIM115
            number,
            "w" if number else "r",
            1 if number == 2 or (number and unbuffered) else -1,
            encoding=old.encoding,
            errors=old.errors,
            closefd=False,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def run(words: list[str]) -> None:
    """What `python WORDS` does, with options `-P` and `-m` only; returns or raises likewise."""
    options, words = words[: 1 + (words[1] == "-P")], words[1 + (words[1] == "-P") :]
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    if len(options) == 1:
        sys.path.insert(0, os.getcwd() if is_module else os.path.dirname(os.path.abspath(words[0])))
    try:
        if is_module:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except Exception as error:
        # The traceback begins in the user's code, as it does without a fork server.
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename in (__file__, runpy.__file__, FROZEN):
            frames = frames.tb_next
        sys.excepthook(type(error), error.with_traceback(frames), frames)
        sys.exit(1)


def receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    """A request and the standard streams that came with it.

    Raises:
        OSError: the requester is another user, or ended.
        ValueError: there are no streams.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    if struct.unpack("3i", credentials)[1] != os.geteuid():
        raise PermissionError
    connection.settimeout(REQUEST_SECONDS)
    header, streams, _, _ = socket.recv_fds(connection, HEADER, 3)
    content, size = b"", int.from_bytes(header, "big")
    while len(content) < size:
        if not (more := connection.recv(1 << 20)):
            raise ConnectionError
        content += more
    if len(streams) != 3:
        raise ValueError
    connection.settimeout(None)
    return content, streams


def main() -> None:
    listener = socket.socket(fileno=int(sys.argv[1]))
    for name in sys.argv[3:]:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the ranks share these pages as long as no collection writes to them
    if words := Server(listener).serve():
        run(words)


if __name__ == "__main__":
    main()
