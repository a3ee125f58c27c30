"""Runs the cells of a sweep, one after the other or several at the same time."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType

from rich import progress as bars
from rich.console import Console

from hpc_absa.errors import ExitStatus
from hpc_absa.parent_death import end_with_parent
from hpc_absa.report import format as text
from hpc_absa.report.timing import finite, latest
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import RunLock
from hpc_absa.study import tables
from hpc_absa.study.sweep import Cell, Failure, StudyDir
from hpc_absa.supervisor.process import PYTHON
from hpc_absa.supervisor.supervisor import STOP_SIGNALS, on_stop

POLL_SECONDS = 0.25
"""Between checks of the running cells."""


class Progress:
    """Bars on a terminal, counted in epochs; elsewhere a line when a cell starts or ends."""

    def __init__(self, study: StudyDir, console: Console) -> None:
        self._study, self._console = study, console
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}", markup=False),
            bars.BarColumn(),
            bars.TextColumn("{task.completed:.1f} of {task.total:g} epochs"),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        epochs = sum(cell.job.train.epochs for cell in study.cells)
        self._all = self._bars.add_task("all cells", total=epochs)
        self._tasks: dict[str, bars.TaskID] = {}
        self._ended_epochs = 0.0

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bars.stop()

    def skip(self, cells: Sequence[Cell]) -> None:
        """These cells are not run: they are done, or failed before."""
        failed = [cell for cell in cells if self._study.state(cell) == "failed"]
        for cell in failed:
            reason = self._study.failures()[cell.name].reason
            self._print(cell, f"failed before: {reason}; --retry runs it again")
        if done := len(cells) - len(failed):
            self._console.print(f"{done} of {len(self._study.cells)} cells were done before")
        self._ended_epochs = sum(cell.job.train.epochs for cell in cells)
        # `reset` and not `update`: cells done before must not count for the remaining time.
        self._bars.reset(self._all, completed=int(self._ended_epochs))

    def started(self, cell: Cell) -> None:
        epochs = cell.job.train.epochs
        self._tasks[cell.name] = self._bars.add_task(f"  {cell.name}", total=epochs)
        if not self._console.is_terminal:
            self._print(cell, "started")

    def ended(self, cell: Cell, seconds: float) -> None:
        self._bars.remove_task(self._tasks.pop(cell.name))
        events, epochs = self._study.run(cell).log.read(), float(cell.job.train.epochs)
        match self._study.state(cell):
            case "done":
                steps = text.plural(latest(events, "steps"), "step")
                accuracy = text.percent(latest(events, "test_accuracy"))
                self._print(cell, f"{accuracy} after {steps}, {text.duration(seconds)}")
            case "failed":
                reason = self._study.failures()[cell.name].reason
                self._print(cell, f"failed: {reason}; log: {self._study.log(cell)}")
            case _:
                epochs = finite(latest(events, "epoch"), 0.0)
                self._print(cell, f"stopped after {text.epoch(epochs)} epochs, saved")
        self._ended_epochs += epochs

    def update(self, running: Sequence[Cell]) -> None:
        if not self._console.is_terminal:
            return
        total = self._ended_epochs
        for cell in running:
            epochs = finite(latest(self._study.run(cell).log.read(), "epoch"), 0.0)
            total += epochs
            self._bars.update(self._tasks[cell.name], completed=epochs)
        self._bars.update(self._all, completed=total)

    def _print(self, cell: Cell, message: str) -> None:
        number, count = self._study.cells.index(cell) + 1, len(self._study.cells)
        line = f"[{number}/{count}] {cell.name}: {message}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class _Process:
    """The supervisor of a running cell."""

    cell: Cell
    popen: subprocess.Popen[bytes]
    slot: int
    """Which share of the cores it has."""
    started: float = field(default_factory=time.monotonic)


class Runner:
    """Runs all cells that are not done; a cell that fails does not stop the others."""

    def __init__(
        self,
        study: StudyDir,
        progress: Progress,
        *,
        side_by_side: int,
        retry: bool,
        allow_changed: tuple[str, ...] = (),
        program: tuple[str, ...] = (*PYTHON, "-m", "hpc_absa"),
    ) -> None:
        """
        Args:
            study: the sweep's cells and folder.
            progress: shows what starts and ends.
            side_by_side: cells that run at the same time.
            retry: start failed cells again, from their newest good checkpoints.
            allow_changed: keys of the job in which a cell that was started may differ.
            program: the program that has the command `run`.
        """
        self._study, self._progress, self._retry = study, progress, retry
        self._allow_changed, self._program = allow_changed, program
        self._slots = list(range(side_by_side))
        self._shares = shares(sorted(os.sched_getaffinity(0)), side_by_side)
        self._running: list[_Process] = []
        self._stops = 0

    def run(self) -> ExitStatus:
        """Run until all cells are done or failed, or a signal arrives; returns the exit status.

        The tables are written at the start and whenever a cell has ended.

        Raises:
            UsageError: a cell was started with another job.
            RunLockedError: another `compare` uses this folder.
        """
        self._study.path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(RunDir(self._study.path))
        lock.acquire()
        handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        on_stop(self._on_signal)
        try:
            self._study.prepare(self._allow_changed)
            tables.write(self._study)
            with self._progress:
                return self._run()
        finally:
            for process in self._running:  # after an exception: leave no process behind
                process.popen.terminate()
            for number, handler in handlers.items():
                signal.signal(number, handler)
            lock.release()

    def _run(self) -> ExitStatus:
        cells, skipped = self._study.cells, ("done",) if self._retry else ("done", "failed")
        waiting = [cell for cell in cells if self._study.state(cell) not in skipped]
        self._progress.skip([cell for cell in cells if cell not in waiting])
        while (waiting and not self._stops) or self._running:
            while waiting and self._slots and not self._stops:
                self._start(waiting.pop(0))
            time.sleep(POLL_SECONDS)
            for process in [p for p in self._running if p.popen.poll() is not None]:
                self._end(process)
                tables.write(self._study)
            self._progress.update([process.cell for process in self._running])
        if self._stops:
            return ExitStatus.STOPPED
        done = all(self._study.state(cell) == "done" for cell in cells)
        return ExitStatus.OK if done else ExitStatus.FAILED

    def _start(self, cell: Cell) -> None:
        self._study.set_failure(cell, None)
        slot = self._slots.pop(0)
        cores = self._shares[slot]

        def in_child() -> None:
            end_with_parent()
            os.sched_setaffinity(0, cores)

        command = [*self._program, "run", str(self._study.job(cell))]
        command += ["--run-dir", str(self._study.run(cell).path)]
        for key in self._allow_changed:
            command += ["--allow-changed", key]
        with self._study.log(cell).open("ab") as log:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # only this process gets Ctrl-C, and stops the cells
                preexec_fn=in_child,
            )
        self._running.append(_Process(cell, popen, slot))
        if self._stops:  # a signal while the process was started
            popen.send_signal(signal.SIGTERM)
        self._progress.started(cell)

    def _end(self, process: _Process) -> None:
        self._running.remove(process)
        self._slots.append(process.slot)
        cell, status = process.cell, process.popen.returncode
        # The second: a stop reached the process before it handled signals.
        stopped = status == ExitStatus.STOPPED or (self._stops > 0 and status == -signal.SIGTERM)
        if self._study.state(cell) != "done" and not stopped:
            reason = _last_line(self._study.log(cell).read_bytes())
            self._study.set_failure(cell, Failure(status, reason))
        self._progress.ended(cell, time.monotonic() - process.started)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The cells save and stop at the first signal, and are ended at the second."""
        if number == signal.SIGHUP and self._stops:
            return
        self._stops += 1
        for process in self._running:
            if process.popen.poll() is None:
                process.popen.send_signal(signal.SIGTERM)


def shares(cores: Sequence[int], count: int) -> list[list[int]]:
    """Divide `cores` into `count` parts; with fewer cores than parts, parts share a core.

    A cell has as many ranks and threads as its share has cores.
    """
    if count >= len(cores):
        return [[cores[part % len(cores)]] for part in range(count)]
    bounds = [part * len(cores) // count for part in range(count + 1)]
    return [list(cores[bounds[part] : bounds[part + 1]]) for part in range(count)]


def _last_line(output: bytes) -> str:
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    return lines[-1].removeprefix("hpc-absa: ") if lines else "no output"
