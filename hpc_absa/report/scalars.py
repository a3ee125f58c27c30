"""The measurements of a run as rows of a table, and their export as CSV and Parquet."""

from __future__ import annotations

import bisect
import csv
import importlib.util
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from hpc_absa.errors import UsageError
from hpc_absa.report.history import History
from hpc_absa.report.timing import AttemptSeconds, finite
from hpc_absa.rundir.events import Event
from hpc_absa.rundir.files import write_atomic

Row = dict[str, float | str]

KINDS = ("phase_start", "progress", "epoch", "decision")
"""Events with measurements."""
POSITION = ("event", "time", "phase", "epoch", "step", "samples", "seconds", "rank_hours")
"""First columns. `seconds`: of the run so far, without pauses; `rank_hours`: times its ranks."""
MARK = b"rank_hours"
"""In the first or last bytes of every exported table: the name of a column."""


def rows(history: History) -> list[Row]:
    """A row for each measurement that no crash undid, in the order of training."""
    clock = Clock(history.attempts)
    found = [_row(event, clock) for event in history.kept if event["event"] in KINDS]
    return sorted((row for row in found if "epoch" in row), key=lambda row: finite(row.get("step")))


def _row(event: Event, clock: Clock) -> Row:
    time = finite(event.get("time"))
    row: Row = {"event": event["event"], "time": time, "phase": float(event["phase"])}
    row["seconds"], rank_seconds = clock.at(time)
    row["rank_hours"] = rank_seconds / 3600
    for name, number in _numbers(event):
        if name not in ("time", "phase", "seconds"):
            row[name] = number
    return row


def _numbers(event: Mapping[str, object]) -> Iterator[tuple[str, float]]:
    """Finite numbers of an event, those in its `metrics` under their own names."""
    for name, value in event.items():
        if isinstance(value, Mapping) and name == "metrics":
            yield from ((f"metrics.{key}", x) for key, x in _numbers(value))
        elif math.isfinite(number := finite(value)):
            yield str(name), number


class Clock:
    """Seconds and rank-seconds of a run at a time, without pauses."""

    def __init__(self, attempts: Sequence[AttemptSeconds]) -> None:
        self._attempts = attempts
        self._begins = [part.attempt.begin for part in attempts]
        self._before = [(0.0, 0.0)]
        """Seconds and rank-seconds before each attempt, and after the last one."""
        for part in attempts:
            seconds, rank_seconds = self._before[-1]
            worked = part.wall * part.attempt.ranks
            self._before.append((seconds + part.wall, rank_seconds + worked))
        self._ends = [part.attempt.end for part in attempts]
        if attempts:  # the wall time of the last one is until the last event
            times = (finite(e.get("time"), self._ends[-1]) for e in attempts[-1].attempt.events)
            self._ends[-1] = max(self._ends[-1], *times)

    def at(self, time: float) -> tuple[float, float]:
        """Args: Unix seconds. Returns seconds and rank-seconds."""
        index = bisect.bisect_right(self._begins, time) - 1
        if index < 0:
            return 0.0, 0.0
        part = self._attempts[index]
        seconds, rank_seconds = self._before[index]
        here = min(part.wall, max(0.0, part.wall - (self._ends[index] - time)))
        return seconds + here, rank_seconds + here * part.attempt.ranks


def columns(table: Sequence[Row]) -> list[str]:
    """The names of the columns, position first."""
    return list(dict.fromkeys([*POSITION, *(name for row in table for name in row)]))


def export(histories: Mapping[str, History], path: Path) -> int:
    """Write the measurements of runs to a `.csv` or `.parquet` file; returns the number of rows.

    Several runs have a first column `run` with their names.

    Raises:
        UsageError: the file's name has another ending, or pyarrow is not installed.
    """
    table: list[Row] = []
    for name, history in histories.items():
        own = rows(history)
        table += own if len(histories) == 1 else [{"run": name, **row} for row in own]
    names = columns(table)
    if len(histories) > 1:
        names = ["run", *(name for name in names if name != "run")]
    content = writer_for(path)(table, names)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    return len(table)


def writer_for(path: Path) -> Callable[[Sequence[Row], Sequence[str]], bytes]:
    """What makes the content of a file of this name.

    Raises:
        UsageError: as `export`.
    """
    writers = {".csv": _csv, ".parquet": _parquet}
    writer = writers.get(path.suffix.lower())
    if writer is None:
        raise UsageError(f"{path}: expected a file name that ends in {' or '.join(writers)}")
    if writer is _parquet and importlib.util.find_spec("pyarrow") is None:
        raise UsageError(
            f"{path}: Parquet needs pyarrow, which is not installed: pip install "
            "'hpc-absa[parquet]', or choose a .csv file"
        )
    return writer


def _csv(table: Sequence[Row], names: Sequence[str]) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return out.getvalue().encode()


def _parquet(table: Sequence[Row], names: Sequence[str]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    content = {name: [row.get(name) for row in table] for name in names}
    parquet.write_table(pyarrow.table(content), out)
    return out.getvalue()
