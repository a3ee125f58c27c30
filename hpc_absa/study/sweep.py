"""The sweep file (TOML): a base job and the grid of what is varied, as cells with a job each."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveInt, ValidationError

from hpc_absa import config
from hpc_absa.config import OWN, SCHEDULES, Count, Job, Section
from hpc_absa.config.file import explain
from hpc_absa.errors import UsageError

Words = Annotated[tuple[str, ...], Field(strict=False)]


class Grid(Section):
    """Every schedule with every maximum batch and every seed."""

    schedule: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """Methods, as in a job's `schedule.method`."""
    max_batch: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()
    """Largest global batches, samples; empty means the base job's."""
    seeds: Annotated[tuple[Count, ...] | None, Field(strict=False)] = None
    """In place of the sweep's."""
    set: Words = ()
    """Further `key=value` for these cells, as after `--set`."""
    label: str = ""
    """Tells these cells from others of the same schedule and batch: `r = 0.4`."""


class Sweep(Section):
    """A whole sweep file."""

    name: str
    """Name of the sweep, for people and for the folder under `runs/`."""
    job: str | dict[str, Any]
    """The base job: a path, from the sweep file's folder, or the job's tables themselves."""
    seeds: Annotated[tuple[Count, ...], Field(strict=False, min_length=1)] = (0,)
    """Seeds of every cell."""
    set: Words = ()
    """Further `key=value` for all cells, as after `--set`."""
    side_by_side: PositiveInt = 1
    """Cells at work at the same time; each has its share of this machine's cores."""
    grid: Annotated[tuple[Grid, ...], Field(strict=False, min_length=1)]
    """What is varied; cells of all entries together."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

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
    sweep = _parse(path)
    base, origin = _base(sweep, path)
    cells = [
        _cell(sweep, grid, base, origin, (schedule, batch, seed), overrides)
        for grid in sweep.grid
        for schedule in grid.schedule
        for batch in grid.max_batch or (None,)
        for seed in grid.seeds or sweep.seeds
    ]
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(
            f"{path}: grid: cell {twice[0]} is there twice; give one of its entries a label"
        )
    return sweep, tuple(cells)


def _parse(path: Path) -> Sweep:
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a sweep file: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: {error}") from None
    try:
        return Sweep.model_validate(tables)
    except ValidationError as error:
        raise UsageError(f"{path}: {explain(error, Sweep)}") from None


def _base(sweep: Sweep, path: Path) -> tuple[Mapping[str, Any], str]:
    """The base job's tables, and where they stand, for errors."""
    if not isinstance(sweep.job, str):
        return sweep.job, f"{path}: job"
    base = path.parent / sweep.job
    try:
        return tomllib.loads(base.read_text(encoding="utf-8")), str(base)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path}: job = {sweep.job!r}: {error}") from None


def _cell(
    sweep: Sweep,
    grid: Grid,
    base: Mapping[str, Any],
    origin: str,
    at: tuple[str, int | None, int],
    overrides: tuple[str, ...],
) -> Cell:
    schedule, batch, seed = at
    tables = dict(base)
    tables["schedule"] = _schedule(base.get("schedule"), schedule, batch)
    tables["seed"] = seed
    tables.setdefault("name", sweep.name)
    job = config.from_tables(tables, origin, (*sweep.set, *grid.set, *overrides))
    words = [schedule, grid.label, str(job.schedule.largest_batch), f"seed{job.seed}"]
    name = "-".join(filter(None, (re.sub(r"[^\w.=+]+", "-", word).strip("-") for word in words)))
    return Cell(
        name=name,
        schedule=f"{schedule} {grid.label}".strip(),
        max_batch=job.schedule.largest_batch,
        seed=job.seed,
        job=job.model_copy(update={"name": f"{sweep.name} {name}"}),
    )


def _schedule(base: Any, method: str, batch: int | None) -> dict[str, Any]:
    """The base job's table for another method: what that one does not know is left out."""
    table = dict(base) if isinstance(base, Mapping) else {}
    if method != table.get("method"):
        known = SCHEDULES.get(method, SCHEDULES[OWN]).model_fields
        table = {key: value for key, value in table.items() if key in known}
    table["method"] = method
    return table | ({"max_batch": batch} if batch is not None else {})
