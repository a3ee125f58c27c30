"""Several runs side by side: which ones, what differs between their jobs, what came out."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_absa.report import format as fmt
from hpc_absa.report.history import Decision, History, require_run
from hpc_absa.report.tables import Cell, Column, Table, schedule_name
from hpc_absa.rundir import RunDir

DEPTH = 3
"""Folders are searched so deep: a sweep's runs are two below `runs`."""
KEY_COLUMNS = 4
"""Differing keys with a column of their own; the others share one."""
KEYS_NAMED = 8
"""Of those, how many are named."""
SAME_FOR_ALL = ("name", "launch", "checkpoint")
"""Tables of a job that are not compared: they do not change what a run computes."""


def run_dirs(paths: Iterable[Path]) -> list[Path]:
    """The run directories at `paths`; of a folder without events, those in it.

    Raises:
        UsageError: a path is neither.
    """
    found: list[Path] = []
    for path in paths:
        inside = list(find_runs(path))
        if not inside:
            require_run(path)
        found += inside or [path]
    return found


def find_runs(folder: Path, depth: int = DEPTH) -> Iterator[Path]:
    """The run directories in a folder, itself included, in the order of their names."""
    if RunDir(folder).is_run:
        yield folder
    elif depth and folder.is_dir():
        try:
            with os.scandir(folder) as entries:
                folders = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
        except PermissionError:
            if depth == DEPTH:
                raise
            return  # another user's, among runs that can be read
        for name in sorted(folders):
            yield from find_runs(folder / name, depth - 1)


def differing(jobs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values are not the same in all jobs, and the values."""
    flat = [dict(_flatten(job)) for job in jobs]
    keys = dict.fromkeys(key for job in flat for key in job)
    values = {key: [job.get(key) for job in flat] for key in keys}
    return {key: some for key, some in values.items() if any(value != some[0] for value in some)}


def _flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if not prefix and key in SAME_FOR_ALL:
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def comparison(runs: Sequence[tuple[str, History]], states: Mapping[str, str]) -> Table:
    """A row for each run: the keys in which its job differs from others, and its results."""
    keys = differing([history.job for _, history in runs])
    own = [key for key in keys if key != "schedule.method"][:KEY_COLUMNS]
    rest = [key for key in keys if key not in own and key != "schedule.method"]
    columns = [Column("run"), Column("schedule"), *(Column(key) for key in own)]
    columns += [Column("other differences")] * bool(rest)
    columns += [
        Column("state"),
        Column("test accuracy", digits=2, suffix=" %"),
        Column("epochs", digits=2),
        Column("SGD iterations", digits=0),
        Column("ranks"),
        Column("wall time, s", digits=1),
        Column("rank-hours", digits=3),
    ]
    rows: list[tuple[Cell, ...]] = []
    for i, (name, history) in enumerate(runs):
        others = ", ".join(f"{key} = {_text(keys[key][i])}" for key in rest[:KEYS_NAMED])
        others += f" and {len(rest) - KEYS_NAMED} more" if len(rest) > KEYS_NAMED else ""
        ranks = [phase.ranks for phase in history.phases]
        results: tuple[Cell, ...] = (
            states.get(name) or ("unfinished" if history.done is None else "done"),
            100 * history.test_accuracy,
            history.epochs_visited,
            history.steps,
            fmt.change(ranks[0], ranks[-1]) if ranks else "",
            history.wall,
            history.cost.charged / 3600,
        )
        given = [_cell(keys[key][i]) for key in own]
        rows.append((name, schedule_name(history.method), *given, *[others] * bool(rest), *results))
    return Table("", tuple(columns), tuple(rows), sortable=True)


def _cell(value: Any) -> Cell:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return value
    return "" if value is None else _text(value)


def _text(value: Any) -> str:
    return "not set" if value is None else str(value)


def folded(decisions: Sequence[Decision]) -> list[tuple[Decision, Decision]]:
    """First and last of each row of the table: equal ones without an estimate are one row."""
    rows: list[tuple[Decision, Decision]] = []
    for decision in decisions:
        before = rows[-1][1] if rows else None
        if before is not None and _same(before, decision):
            rows[-1] = rows[-1][0], decision
        else:
            rows.append((decision, decision))
    return rows


def _same(one: Decision, other: Decision) -> bool:
    estimated = one.matvecs > 0 or other.matvecs > 0
    return not estimated and (one.action, one.reason) == (other.action, other.reason)
