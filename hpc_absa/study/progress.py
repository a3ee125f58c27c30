"""How far a sweep is, for people: bars on a terminal, a line a cell elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich import progress as bars
from rich.console import Console

from hpc_absa.report import text
from hpc_absa.report.history import load
from hpc_absa.rundir import RunDir
from hpc_absa.study.folder import StudyDir
from hpc_absa.study.sweep import Cell


class Progress:
    """One bar for the sweep and one for each cell at work, counted in epochs."""

    def __init__(self, study: StudyDir, cells: Sequence[Cell], console: Console) -> None:
        """`console` is not where the tables go."""
        self._study, self._cells, self._console = study, cells, console
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.TextColumn("{task.completed:.1f} of {task.total:g} epochs"),
            bars.TimeElapsedColumn(),
            bars.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._bars.add_task("all cells", total=sum(map(_epochs, cells)))
        self._tasks: dict[str, bars.TaskID] = {}
        self._over: dict[str, float] = {}

    def __enter__(self) -> Progress:
        """Show the bars."""
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        self._bars.stop()

    def begin(self, over: Sequence[Cell]) -> None:
        """Some cells need no work: they are done, or failed before."""
        self._over = {cell.name: float(_epochs(cell)) for cell in over}
        failures = self._study.failures()
        for cell in over:
            if cell.name in failures:
                self._say(cell, f"failed before: {failures[cell.name].reason}; --retry tries again")
        known = len(over) - sum(cell.name in failures for cell in over)
        if known:
            self._console.print(f"{known} of {len(self._cells)} cells were done before")
        # Not an update: what was done before says nothing of the pace.
        self._bars.reset(self._all, completed=int(sum(self._over.values())))

    def started(self, cell: Cell) -> None:
        """A cell has begun or goes on."""
        self._tasks[cell.name] = self._bars.add_task(f"  {cell.name}", total=_epochs(cell))
        if not self._console.is_terminal:
            self._say(cell, "at work")

    def ended(self, cell: Cell, failure: str | None, seconds: float) -> None:
        """A cell is done, stopped, or failed."""
        self._bars.remove_task(self._tasks.pop(cell.name))
        self._over[cell.name] = float(_epochs(cell))
        if failure is not None:
            self._say(cell, f"failed: {failure}; log: {self._study.log(cell)}")
            return
        history = load(self._study.cell(cell).path)
        if history.done is None:
            self._over[cell.name] = history.epochs_visited
            self._say(cell, f"stopped after {text.epoch(history.epochs_visited)} epochs, saved")
            return
        accuracy = text.percent(history.test_accuracy)
        took = text.duration(seconds)
        self._say(cell, f"{accuracy} after {text.plural(history.steps, 'step')}, {took}")

    def look(self, working: Sequence[Cell]) -> None:
        """Read how far the cells at work have come."""
        if not self._console.is_terminal:
            return
        total = sum(self._over.values())
        for cell in working:
            epochs = _visited(self._study.cell(cell))
            total += epochs
            self._bars.update(self._tasks[cell.name], completed=epochs)
        self._bars.update(self._all, completed=total)

    def _say(self, cell: Cell, words: str) -> None:
        place = self._cells.index(cell) + 1
        line = f"[{place}/{len(self._cells)}] {cell.name}: {words}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


def _epochs(cell: Cell) -> int:
    return cell.job.train.epochs


def _visited(run: RunDir) -> float:
    """Epochs that a run has come to, from its events."""
    known = [e["epoch"] for e in run.log.read() if isinstance(e.get("epoch"), int | float)]
    return float(known[-1]) if known else 0.0
