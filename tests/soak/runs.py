"""Supervised runs of a small job that can be killed, signalled and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import psutil

from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event
from hpc_absa.rundir.paths import checkpoint_files
from tests.soak import watched
from tests.supervised import ranks

ROOT = Path(__file__).resolve().parents[2]

JOB = """
name = "soak"
[data]
name = "digits"
[model]
name = "tests.soak.watched:network"
[train]
epochs = {epochs}
microbatch = 32
lr = 0.05
threads_per_rank = 1
reproducible = true
[schedule]
method = "absa"
base_batch = {base}
max_batch = {largest}
kappa = {kappa}
[hessian]
samples = 128
tol = 0.1
[ranks]
initial = {initial}
max = {most}
[checkpoint]
every_seconds = 0.2
[launch]
max_restarts = 10
"""
"""Digits, reproducible; the batch doubles every `kappa` epochs at the latest."""


def write_job(folder: Path, *, base: int = 32, largest: int = 128, **shape: int) -> Path:
    """The job as a file, with its `epochs`, `kappa`, `initial` and `most` ranks; its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "soak.toml"
    path.write_text(JOB.format(base=base, largest=largest, **shape))
    return path


_started: list[SoakRun] = []


def reap(folder: Path) -> None:
    """End what a test that failed has left running under its folder."""
    for run in _started:
        if run.run.path.is_relative_to(folder) and run.process and run.ended() is None:
            run.kill_tree()


class SoakRun:
    """One run directory and its supervisor, in a separate session."""

    def __init__(self, folder: Path, job: Path, *words: str, **environment: str) -> None:
        self.run, self.watched = RunDir(folder / "run"), folder / "watched"
        self.watched.mkdir(parents=True, exist_ok=True)
        self.words = [sys.executable, "-m", "hpc_absa", "run", str(job)]
        self.words += ["--run-dir", str(self.run.path), *words]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self.environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self.environment |= {watched.FOLDER: str(self.watched), **environment}
        self.output = folder / "output"
        self.process: subprocess.Popen[bytes] | None = None
        _started.append(self)

    def start(self) -> SoakRun:
        """Give the command, for the first time or again."""
        with self.output.open("ab") as output:
            self.process = subprocess.Popen(
                self.words,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def ended(self) -> int | None:
        """The supervisor's exit status, None while it runs."""
        assert self.process is not None
        return self.process.poll()

    def finish(self, timeout: float = 240) -> int:
        """The supervisor's exit status, once it has ended."""
        assert self.process is not None
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            tail = self.output_tail()
            self.kill_tree()
            raise AssertionError(f"still running after {timeout} s:\n{tail}") from None

    def output_tail(self) -> str:
        """The end of what the run printed."""
        return self.output.read_text(errors="replace")[-6000:]

    def events(self, kind: str) -> list[Event]:
        """The events of one kind."""
        return [e for e in self.run.log.read() if e["event"] == kind]

    def wait_for(self, condition: Callable[[], object], what: str, timeout: float = 90) -> None:
        """Return once `condition` holds."""
        until = time.monotonic() + timeout
        while not condition():
            if self.ended() is not None or time.monotonic() > until:
                tail = self.output_tail()
                self.kill_tree()
                raise AssertionError(f"never came to {what}; exit {self.ended()}:\n{tail}")
            time.sleep(0.002)

    # Processes

    def supervisor(self) -> psutil.Process:
        """The supervisor."""
        assert self.process is not None
        return psutil.Process(self.process.pid)

    def mpirun(self) -> psutil.Process | None:
        """The launcher, where there is one at present."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.supervisor().children():
                with contextlib.suppress(psutil.NoSuchProcess, IndexError):
                    if Path(child.cmdline()[0]).name == "mpirun":
                        return child
        return None

    def ranks(self) -> list[psutil.Process]:
        """The running ranks by rank, where there is a launcher at present."""
        found = []
        for pid in ranks(self.run) if self.mpirun() else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(psutil.Process(pid))
        return found

    def kill_tree(self) -> None:
        """SIGKILL the supervisor and everything under it."""
        assert self.process is not None
        tree = []
        with contextlib.suppress(psutil.NoSuchProcess):
            tree = [*self.supervisor().children(recursive=True), self.supervisor()]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        self.process.wait(30)


def weights(run: RunDir) -> str:
    """SHA-256 of all weights and statistics, and of the momentum, in the newest checkpoint."""
    import hashlib

    hasher = hashlib.sha256()
    with h5py.File(checkpoint_files(run.checkpoints)[-1], locking=False) as file:
        for group in ("model", "optimizer"):
            for name in sorted(file[group]):
                hasher.update(name.encode() + file[group][name][()].tobytes())
    return hasher.hexdigest()
