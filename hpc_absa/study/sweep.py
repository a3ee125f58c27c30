"""The sweep file (TOML): a base job and the grid of what is varied; and the folder of a sweep."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, ValidationError

from hpc_absa import config
from hpc_absa.config import SCHEDULES, USER_DEFINED, Job
from hpc_absa.errors import UsageError
from hpc_absa.report.timing import finite
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.files import write_atomic
from hpc_absa.section import Count, Section, Strings, explain
from hpc_absa.supervisor import run_state


class Grid(Section):
    """Every schedule with every maximum batch and every seed."""

    schedule: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Methods, as in a job's `schedule.method`."""
    max_batch: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()
    """Largest global batches, samples; empty means the base job's."""
    seeds: Annotated[tuple[Count, ...] | None, Field(strict=False)] = None
    """In place of the sweep's."""
    set: Strings = ()
    """Further `key=value` for these cells, as after `--set`."""
    label: str = ""
    """Distinguishes these cells from others of the same schedule and batch: `r = 0.4`."""


class Sweep(Section):
    name: str
    """Name of the sweep, and by default of its folder under `runs/`."""
    job: str | dict[str, Any]
    """The base job: a path, from the sweep file's folder, or the job's tables themselves."""
    seeds: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = (0,)
    """Seeds of every cell."""
    set: Strings = ()
    """Further `key=value` for all cells, as after `--set`."""
    side_by_side: PositiveInt = 1
    """Cells that run at the same time; each has its share of this machine's cores."""
    grid: Annotated[tuple[Grid, ...], Field(strict=False, min_length=1)]
    """What is varied; cells of all entries together."""


@dataclass(frozen=True)
class Cell:
    name: str
    """Of its folder, unique in the sweep: `absa-1024-seed0`."""
    schedule: str
    """Method and label, as in the tables: `absa`, `absa r = 0.4`."""
    max_batch: int
    seed: int
    job: Job


def load(path: Path, overrides: tuple[str, ...] = ()) -> tuple[Sweep, tuple[Cell, ...]]:
    """The sweep in `path` and its cells, each with its whole job, `overrides` applied to all.

    Raises:
        UsageError: one line that names file, key, value and what was expected.
    """
    tables = config.read(path, "a sweep file")
    if "grid" not in tables and "schedule" in tables:
        raise UsageError(f"{path}: a job file, expected a sweep file: hpc-absa run {path}")
    try:
        sweep = Sweep.model_validate(tables)
    except ValidationError as error:
        raise UsageError(f"{path}: {explain(error, Sweep)}") from None
    base, origin = _base(sweep, path)
    cells: dict[str, Cell] = {}
    for grid in sweep.grid:
        for method, batch, seed in itertools.product(
            grid.schedule, grid.max_batch or (None,), grid.seeds or sweep.seeds
        ):
            schedule = _schedule(base.get("schedule"), method, batch)
            tables = {"name": sweep.name, **base, "schedule": schedule, "seed": seed}
            job = config.from_tables(tables, origin, (*sweep.set, *grid.set, *overrides))
            cell = _cell(sweep.name, method, grid.label, job)
            if cell.name in cells:
                twice = f"{path}: grid: cell {cell.name} is there twice"
                raise UsageError(f"{twice}; give one of its entries a label")
            cells[cell.name] = cell
    return sweep, tuple(cells.values())


def _base(sweep: Sweep, path: Path) -> tuple[Mapping[str, Any], str]:
    if not isinstance(sweep.job, str):
        return sweep.job, f"{path}: job"
    base = path.parent / sweep.job
    try:
        return config.read(base), str(base)
    except UsageError as error:
        raise UsageError(f"{path}: job = {sweep.job!r}: {error}") from None


def _schedule(base: Any, method: str, batch: int | None) -> dict[str, Any]:
    """The base job's table for another method, without the keys that this method does not have."""
    table = dict(base) if isinstance(base, Mapping) else {}
    if method != table.get("method"):
        known = SCHEDULES.get(method, SCHEDULES[USER_DEFINED]).model_fields
        table = {key: value for key, value in table.items() if key in known}
    table["method"] = method
    return table | ({"max_batch": batch} if batch is not None else {})


def _cell(sweep: str, method: str, label: str, job: Job) -> Cell:
    max_batch = job.schedule.largest_batch
    parts = [method, label, str(max_batch), f"seed{job.seed}"]
    name = "-".join(filter(None, (re.sub(r"[^\w.=+]+", "-", part).strip("-") for part in parts)))
    job = job.model_copy(update={"name": f"{sweep} {name}"})
    return Cell(name, f"{method} {label}".strip(), max_batch, job.seed, job)


State = Literal["done", "failed", "unfinished", "new"]


@dataclass(frozen=True)
class Failure:
    """How the last attempt at a cell ended."""

    exit_status: int
    reason: str
    """The last line of its output."""


class StudyDir:
    """The folder of a sweep: a run directory per cell, and which cells failed."""

    def __init__(self, path: Path, cells: tuple[Cell, ...]) -> None:
        self.path, self.cells = path, cells
        self.tables = path / "tables"
        self._jobs = path / "jobs"
        self._failed = path / "failed.json"
        self._runs = {cell.name: RunDir(path / cell.name) for cell in cells}

    def run(self, cell: Cell) -> RunDir:
        """Always the same object, so that its `log` reads only new lines."""
        return self._runs[cell.name]

    def job(self, cell: Cell) -> Path:
        return self._jobs / f"{cell.name}.toml"

    def log(self, cell: Cell) -> Path:
        return self._jobs / f"{cell.name}.log"

    def state(self, cell: Cell) -> State:
        done = run_state.finished(self.run(cell))
        if done and finite(done.get("epochs"), math.inf) >= cell.job.train.epochs:
            return "done"
        if cell.name in self.failures():
            return "failed"
        return "unfinished" if self.run(cell).events.exists() else "new"

    def prepare(self, allow_changed: tuple[str, ...] = ()) -> None:
        """Write the cells' job files.

        Raises:
            UsageError: a cell was started with another job, or there are tables of another origin.
        """
        if self.tables.exists() and not self._jobs.exists():
            raise UsageError(
                f"{self.tables}: exists and is not of a sweep; choose another --out, or remove it"
            )
        for cell in self.cells:
            started = self.run(cell).job
            if started.exists():
                saved = config.load(started, warn=False)
                config.refuse_changes(saved, cell.job, str(started), allow_changed)
        self._jobs.mkdir(parents=True, exist_ok=True)
        for cell in self.cells:
            self.job(cell).write_text(config.dump(cell.job), encoding="utf-8")

    def failures(self) -> dict[str, Failure]:
        try:
            failures = json.loads(self._failed.read_text(encoding="utf-8"))
            return {name: Failure(**fields) for name, fields in failures.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def set_failure(self, cell: Cell, failure: Failure | None) -> None:
        """Record how a cell failed; None removes the record."""
        before = self.failures()
        now = {**before, cell.name: failure}
        failures = {name: known for name, known in now.items() if known}
        if failures != before:
            content = {name: asdict(known) for name, known in failures.items()}
            write_atomic(self._failed, json.dumps(content, indent=2) + "\n")
