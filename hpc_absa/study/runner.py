"""The cells of a sweep at work: one after the other, or several side by side."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Literal

from hpc_absa.errors import ExitStatus
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import RunLock
from hpc_absa.study.folder import Failure, StudyDir
from hpc_absa.study.progress import Progress
from hpc_absa.study.sweep import Cell
from hpc_absa.supervisor import driver
from hpc_absa.supervisor.driver import STOPS
from hpc_absa.supervisor.world import end_with_parent

LOOK_EVERY = 0.25
"""Seconds between looks at the cells at work."""

State = Literal["done", "failed", "unfinished", "new"]


@dataclass(frozen=True)
class AtWork:
    """A cell's supervisor."""

    cell: Cell
    process: subprocess.Popen[bytes]
    place: int
    """Which share of the cores it has."""
    began: float = field(default_factory=time.monotonic)


def state(study: StudyDir, cell: Cell) -> State:
    """Where a cell stands, from its files alone."""
    run = study.cell(cell)
    if driver.finished(run):
        return "done"
    if cell.name in study.failures():
        return "failed"
    return "unfinished" if run.events.exists() else "new"


class Runner:
    """Starts what is to be done and waits for it; a cell that fails does not hold up the others."""

    def __init__(
        self,
        study: StudyDir,
        cells: tuple[Cell, ...],
        *,
        side_by_side: int,
        retry: bool,
        progress: Progress,
        allow_changed: tuple[str, ...] = (),
        program: tuple[str, ...] = (sys.executable, "-m", "hpc_absa"),
    ) -> None:
        """Nothing is started yet.

        Args:
            study: the sweep's folder.
            cells: all of the sweep.
            side_by_side: cells at work at a time.
            retry: start failed cells again, from their newest good checkpoints.
            progress: tells people.
            allow_changed: keys of the job in which a cell begun may differ.
            program: what `run` is a command of.
        """
        self._program = program
        self._study, self._cells, self._progress = study, cells, progress
        self._allow_changed = allow_changed
        self._places = list(range(side_by_side))
        self._shares = shares(sorted(os.sched_getaffinity(0)), side_by_side)
        self._retry = retry
        self._working: list[AtWork] = []
        self._stops = 0

    def run(self, ended: Callable[[], None]) -> ExitStatus:
        """Work until all cells are done or failed, or a signal comes; the exit status.

        Args:
            ended: called after each cell that has ended.

        Raises:
            UsageError: a cell was begun with another job.
            RunLockedError: another `compare` is at work on this folder.
        """
        self._study.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(RunDir(self._study.path))
        lock.acquire()
        before = {number: signal.signal(number, self._on_signal) for number in STOPS}
        try:
            self._study.prepare(self._cells, self._allow_changed)
            with self._progress:
                return self._run(ended)
        finally:
            for one in self._working:  # an error of ours: nobody is left behind
                one.process.terminate()
            for number, handler in before.items():
                signal.signal(number, handler)
            lock.release()

    def _run(self, ended: Callable[[], None]) -> ExitStatus:
        states = {cell.name: state(self._study, cell) for cell in self._cells}
        again = ("new", "unfinished", *(["failed"] if self._retry else []))
        waiting = [cell for cell in self._cells if states[cell.name] in again]
        self._progress.begin([cell for cell in self._cells if cell not in waiting])
        while (waiting and not self._stops) or self._working:
            while waiting and self._places and not self._stops:
                self._start(waiting.pop(0))
            time.sleep(LOOK_EVERY)
            for one in [one for one in self._working if one.process.poll() is not None]:
                self._end(one)
                ended()
            self._progress.look([one.cell for one in self._working])
        if self._stops:
            return ExitStatus.STOPPED
        left = {state(self._study, cell) for cell in self._cells} - {"done"}
        return ExitStatus.FAILED if left else ExitStatus.OK

    def _start(self, cell: Cell) -> None:
        self._forget_failure(cell)
        place = self._places.pop(0)
        cores = self._shares[place]

        def in_child() -> None:
            end_with_parent()
            os.sched_setaffinity(0, cores)

        words = [*self._program, "run", str(self._study.job(cell))]
        words += ["--run-dir", str(self._study.cell(cell).path)]
        for key in self._allow_changed:
            words += ["--allow-changed", key]
        with self._study.log(cell).open("ab") as log:
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes to us alone, and from us to the cells
                preexec_fn=in_child,
            )
        self._working.append(AtWork(cell, process, place))
        self._progress.started(cell)

    def _end(self, one: AtWork) -> None:
        self._working.remove(one)
        self._places.append(one.place)
        status, cell = one.process.returncode, one.cell
        failure = None
        if driver.finished(self._study.cell(cell)) is None and status != ExitStatus.STOPPED:
            failure = Failure(status, _last_line(self._study.log(cell).read_bytes()))
            self._study.keep_failures({**self._study.failures(), cell.name: failure})
        seconds = time.monotonic() - one.began
        self._progress.ended(cell, failure.reason if failure else None, seconds)

    def _forget_failure(self, cell: Cell) -> None:
        failures = self._study.failures()
        if failures.pop(cell.name, None):
            self._study.keep_failures(failures)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """First: the cells save and stop. Second: they end now."""
        self._stops += 1
        for one in self._working:
            if one.process.poll() is None:
                one.process.send_signal(signal.SIGTERM)


def shares(cores: Sequence[int], count: int) -> list[list[int]]:
    """`cores` dealt out in `count` parts; where there are fewer cores, parts share one.

    So a cell's ranks and threads are as many as its share has cores.
    """
    if count >= len(cores):
        return [[cores[place % len(cores)]] for place in range(count)]
    return [
        list(cores[place * len(cores) // count : (place + 1) * len(cores) // count])
        for place in range(count)
    ]


def _last_line(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("hpc-absa: ") if lines else "it said nothing"
