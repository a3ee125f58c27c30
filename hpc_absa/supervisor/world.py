"""One world of ranks as the supervisor sees it: a process, its output, its end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc_absa.supervisor.launchers import Command

PR_SET_PDEATHSIG = 1
KILLED = re.compile(
    r"process rank (?P<rank>\d+) with PID \d+ on node (?P<host>\S+) "
    r"exited on signal (?P<signal>\d+)"
)
"""What Open MPI's mpirun says of a rank that a signal ended."""


@dataclass(frozen=True)
class Ending:
    """How the launcher's process ended."""

    exit_code: int
    tail: tuple[str, ...]
    """The last lines it printed."""
    late: bool = False
    """Ended because its ranks had not found each other in time."""

    def killed_rank(self) -> tuple[int, str, int] | None:
        """Rank, host and signal of a rank that was killed, where the launcher said so."""
        match = KILLED.search(" ".join(" ".join(self.tail).split()))
        if match is None:
            return None
        return int(match["rank"]), match["host"], int(match["signal"])

    def fatal_signal(self) -> int | None:
        """The signal that ended a rank, or the launcher itself; None where none did."""
        if killed := self.killed_rank():
            return killed[2]
        if "KeyboardInterrupt" in self.tail:  # Ctrl-C, as an interpreter that just starts takes it
            return signal.SIGINT
        return -self.exit_code if self.exit_code < 0 else None


class World:
    """A launcher's process in a session of its own, so that Ctrl-C reaches the supervisor alone."""

    def __init__(
        self, command: Command, log: Path, lock: int | None, show: Callable[[str], None]
    ) -> None:
        """Start `command`.

        Args:
            command: the launcher's.
            log: gets everything the launcher and rank 0 print.
            lock: descriptor of the run's lock, which the world holds on to if we die.
            show: gets every line for people.
        """
        self._tail: deque[str] = deque(maxlen=60)
        self._process = subprocess.Popen(
            command.words,
            env=os.environ | command.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
            preexec_fn=end_with_parent,
        )
        self._reader = threading.Thread(target=self._read, args=(log, show), name="output")
        self._reader.start()

    def wait(self, joined: Path, patience: float, look: Callable[[], None]) -> Ending:
        """Return when the launcher and its output have ended.

        Args:
            joined: exists once the world's ranks have found each other.
            patience: seconds after which a world that has not come so far is ended.
            look: called some times a second meanwhile.
        """
        until = time.monotonic() + patience
        late = False
        while True:
            try:
                code = self._process.wait(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                look()
                if not late and time.monotonic() > until and not joined.exists():
                    late = True
                    self.kill()
        self._reader.join(timeout=10)
        return Ending(code, tuple(self._tail), late)

    def kill(self) -> None:
        """End everything now: the launcher is told first, because only it reaches other hosts."""
        with contextlib.suppress(ProcessLookupError):
            self._process.terminate()
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self, log: Path, show: Callable[[str], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._tail.append(line.rstrip("\n"))
            # A disk without room for the log must not stop the reading: the world would wait.
            with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
                file.write(line)
            show(line.rstrip("\n"))


_libc = ctypes.CDLL(None)


def end_with_parent() -> None:
    """In a child, before it executes: ask for SIGTERM when the parent dies, even by SIGKILL."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
