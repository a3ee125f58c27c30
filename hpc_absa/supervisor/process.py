"""The launcher's process: its output, its exit, and what the exit shows about the ranks."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc_absa.errors import ExitStatus
from hpc_absa.parent_death import end_with_parent
from hpc_absa.rundir import RunDir
from hpc_absa.supervisor.launchers import Command

PYTHON = (sys.executable, "-P")
"""This interpreter, without the current folder on its path: a `random.py` there is not ours. The
modules that a job names are found in the current folder last (`plugins.py`)."""

KILLED = re.compile(
    r"process rank (?P<rank>\d+) with PID \d+ on node (?P<host>\S+) "
    r"exited on signal (?P<signal>\d+)"
)
"""What Open MPI's mpirun prints for a rank that a signal ended."""


NOTICE = re.compile(r"\s*-{20,}\s*")
"""The line before and after a notice of Open MPI's mpirun."""
EXCEPTION = re.compile(r"([A-Za-z_]\w*\.)*[A-Z]\w*(Error|Exception|Interrupt)(: .*)?")
"""The last line of a traceback."""
POLL_SECONDS = 0.05
EXIT_SECONDS = 0.1
"""Between a rank's failure and the kill of the others, which may be reporting theirs."""
TAG = re.compile(r"\[\d+,\d+\]<std(out|err)>:")
"""What horovodrun writes before each piece of a rank's output."""


@dataclass(frozen=True)
class Failure:
    """Why the ranks ended before the end of their phase."""

    reason: str
    rank: int | None = None
    host: str | None = None
    exit_code: int | None = None
    final: bool = False
    """A restart would fail the same way."""
    early: bool = False
    """A script failed before its `hpc_absa.Run` began."""
    seconds: float = 0.0
    """As of `Exit`."""


@dataclass(frozen=True)
class Exit:
    """How the launcher's process ended."""

    code: int
    tail: tuple[str, ...]
    """The last lines it printed."""
    start_timed_out: bool = False
    """Killed because its ranks had not connected to each other in time."""
    seconds: float = 0.0
    """From a rank's failure to this end, where the launcher was not waited for."""

    def killed_rank(self) -> tuple[int, str, int] | None:
        """Rank, host and signal of a rank that was killed, where the launcher printed it."""
        match = KILLED.search(" ".join(" ".join(self.tail).split()))
        if match is None:
            return None
        return int(match["rank"]), match["host"], int(match["signal"])

    def last_line(self) -> str:
        """The last Python exception of a rank, or else its last line; no notices of the launcher.

        Ranks print at the same time, so the exception may be followed by another rank's lines.
        """
        lines, in_notice = [], False
        for line in self.tail:
            if NOTICE.fullmatch(line):
                in_notice = not in_notice
            elif not in_notice and (text := TAG.sub("", line).strip()):
                lines.append(text)
        exceptions = [line for line in lines if EXCEPTION.fullmatch(line)]
        return (exceptions or lines or [""])[-1]

    def fatal_signal(self) -> int | None:
        """The signal that ended a rank, or the launcher itself; None where none did."""
        if killed := self.killed_rank():
            return killed[2]
        if "KeyboardInterrupt" in self.tail:  # Ctrl-C while the interpreter was starting
            return signal.SIGINT
        return -self.code if self.code < 0 else None


class LauncherProcess:
    """A launcher in a separate session, so that Ctrl-C reaches only the supervisor."""

    def __init__(
        self, command: Command, log: Path, lock: int | None, show: Callable[[str], None]
    ) -> None:
        """Start `command`.

        Args:
            command: the launcher's.
            log: receives everything the launcher and rank 0 print.
            lock: descriptor of the run's lock, which the launcher holds if this process dies.
            show: called with every line.
        """
        self._tail: deque[str] = deque(maxlen=60)
        self._abandoned = False
        """What it prints is no longer shown."""
        self._process = subprocess.Popen(
            command.words,
            env=os.environ | command.environment,
            cwd=command.directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
            pass_fds=() if lock is None else (lock,),
            preexec_fn=end_with_parent,
        )
        # A daemon: ssh's master connection to a host may keep the pipe open long after the ranks.
        self._reader = threading.Thread(
            target=self._read, args=(log, show), name="output", daemon=True
        )
        self._reader.start()

    def wait(
        self,
        run: RunDir,
        start_seconds: float,
        poll: Callable[[], None],
        phase_ended: Callable[[], bool],
        only_here: bool,
    ) -> Exit:
        """Return when the launcher and its output have ended, or its ranks after one has failed.

        Args:
            run: has a file once the ranks have connected to each other, and one if a rank failed.
            start_seconds: the launcher is killed if connecting takes longer.
            poll: called often until then.
            phase_ended: whether the ranks have written the end of their phase.
            only_here: all ranks are the launcher's children. They are then killed when one has
                failed, without waiting for the launcher, which takes 6 s for it and its own end.
        """
        until = time.monotonic() + start_seconds
        failed = 0.0
        timed_out = False
        while True:
            try:
                code = self._process.wait(timeout=POLL_SECONDS)
                break
            except subprocess.TimeoutExpired:
                poll()
            now = time.monotonic()
            if not timed_out and now > until and not run.joined.exists():
                timed_out = True
                self.kill()
            if only_here and not failed and _one_failed(run.failure) and not phase_ended():
                failed = now
            if failed and now - failed > EXIT_SECONDS:
                if (ranks := self._children()) is None:
                    only_here, failed = False, 0.0  # the launcher ends them
                    continue
                self._abandoned = True
                for rank in ranks:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(rank, signal.SIGKILL)
                return Exit(ExitStatus.FAILED, tuple(self._tail), seconds=now - failed)
        self._reader.join(timeout=10)
        return Exit(code, tuple(self._tail), timed_out)

    def finish(self) -> None:
        """Wait for a launcher whose ranks have ended; end it where it does not."""
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join(timeout=10)

    def _children(self) -> set[int] | None:
        """The launcher's processes; None where the kernel does not list them."""
        children = set[int]()
        if not (lists := list(Path(f"/proc/{self._process.pid}/task").glob("*/children"))):
            return None
        for path in lists:
            with contextlib.suppress(OSError):
                children.update(map(int, path.read_text().split()))
        return children

    def kill(self) -> None:
        """End all ranks now: SIGTERM to the launcher, which alone reaches other hosts; SIGKILL."""
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
            # A full disk must not stop the reading: the ranks would block on a full pipe.
            with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
                file.write(line)
            if not self._abandoned:
                with contextlib.suppress(Exception):  # nor must a console that was closed
                    show(line.rstrip("\n"))


def _one_failed(record: Path) -> bool:
    """Whether a rank has failed alone; after a usage error, all ranks exit by themselves."""
    try:
        return not json.loads(record.read_bytes()).get("final")
    except (OSError, ValueError):  # none, or not written yet
        return False
