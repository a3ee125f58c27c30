"""`hpc-absa run` in a separate process: start it, watch it, wait for it."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event
from hpc_absa.supervisor.forking import NAME


class Supervised:
    """A run as its user sees it: a command, its output, its run directory."""

    timeout = 120.0
    """Seconds after which waiting fails the test."""

    def __init__(self, job: Path, run: RunDir, *words: str, environment: Mapping[str, str]) -> None:
        self.job, self.run, self.environment = job, run, environment
        self.words = [sys.executable, "-m", "hpc_absa", "run", str(job)]
        self.words += ["--run-dir", str(run.path), *words]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Self:
        self.process = subprocess.Popen(
            self.words,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return self

    def finish(self, timeout: float | None = None) -> tuple[int, str]:
        """Exit status and output."""
        assert self.process is not None
        timeout = timeout or self.timeout
        try:
            output, _ = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._fail(f"still running after {timeout} s")
        return self.process.returncode, output

    def events(self, kind: str) -> list[Event]:
        return [e for e in self.run.log.read() if e["event"] == kind]

    def wait_for(self, kind: str, count: int = 1) -> None:
        """Return once so many events of this kind are written."""
        assert self.process is not None
        until = time.monotonic() + self.timeout
        while True:
            over = self.process.poll() is not None or time.monotonic() > until
            if len(self.events(kind)) >= count:
                return
            if over:
                self._fail(f"no {count} {kind} events")
            time.sleep(0.02)

    def ranks(self) -> list[int]:
        """Process ids of the running ranks, by rank."""
        return ranks(self.run)

    def diagnostics(self) -> str:
        """More output for the message of a failed test."""
        return ""

    def _fail(self, why: str) -> None:
        assert self.process is not None
        self.process.kill()
        import pytest  # benchmarks use this module without it

        pytest.fail(f"{why}: {self.process.communicate()[0]}\n{self.diagnostics()}")


def processes(run: RunDir) -> dict[int, str]:
    """The command of each process on this machine that has the run directory as an argument."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if str(run.path).encode() in words:
                found[int(path.parent.name)] = b" ".join(words).decode(errors="replace")
    return found


def ranks(run: RunDir) -> list[int]:
    """Process ids of a run's ranks on this machine, by rank."""
    found = {}
    for pid, command in processes(run).items():
        path = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):
            name = (path / "comm").read_text().strip()
            environment = (path / "environ").read_bytes()
            number = re.search(rb"OMPI_COMM_WORLD_RANK=(\d+)", environment)
            if name.startswith(NAME):
                found[int(name.removeprefix(NAME))] = pid
            elif " train " in command and not re.search("mpirun|forked_rank", command):
                found[int(number[1]) if number else 0] = pid
    return [found[rank] for rank in sorted(found)]
