"""The talk's two tables of a sweep, from the run directories of its cells."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from hpc_absa.report import page, tables
from hpc_absa.report.history import load
from hpc_absa.report.published import SCHEDULE_NAMES, published_tables
from hpc_absa.report.table import Table
from hpc_absa.report.tables import RunResult, run_result
from hpc_absa.study.folder import StudyDir
from hpc_absa.study.sweep import Cell


def of(study: StudyDir, cells: Sequence[Cell]) -> dict[str, Table]:
    """`accuracy` and `time`, from whatever cells are done; the others are told of in a note.

    The talk's numbers stand beside those of a sweep whose job is the talk's.
    """
    results = [_result(study, cell) for cell in cells]
    talk = published_tables(cells[0].job.data.name, cells[0].job.model.name, _base_batch(cells))
    done = [result for result in results if result.seconds]
    several = _several_batches(results)

    def row(result: RunResult) -> str:
        name = tables.schedule_name(result.schedule)
        return f"{name} {result.max_batch}" if result.schedule in several else name

    first = min((r for r in done if r.schedule == "bl"), key=_batch, default=None)
    return {
        "accuracy": tables.accuracy_table(results, published="accuracy" in talk),
        "time": tables.time_table(
            sorted(done, key=lambda result: (_rank(result), result.max_batch)),
            baseline=row(first) if first else "",
            label=row,
            published="time" in talk,
        ),
    }


def write(folder: Path, made: dict[str, Table]) -> list[Path]:
    """Each table as Markdown, CSV, LaTeX and a page of HTML; the files, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, table in made.items():
        for suffix, text in table.formats().items():
            path = folder / f"{name}.{suffix}"
            temporary = path.with_name(f".{path.name}.{os.getpid()}")
            whole = page.document(table.title, [text]) if suffix == "html" else text
            temporary.write_text(whole, encoding="utf-8")
            os.replace(temporary, path)
            paths.append(path)
    return paths


def _result(study: StudyDir, cell: Cell) -> RunResult:
    """What a cell came to: NaN and no seconds unless it is done."""
    run = study.cell(cell)
    if run.events.exists():
        result = run_result(load(run.path), cell.max_batch, cell.seed)
        if result.accuracy == result.accuracy:
            return replace(result, schedule=cell.schedule)
    return RunResult(cell.schedule, cell.max_batch, cell.seed, float("nan"), float("nan"))


def _base_batch(cells: Iterable[Cell]) -> int:
    return min(cell.job.schedule.base_batch for cell in cells)


def _several_batches(results: Iterable[RunResult]) -> set[str]:
    """Schedules that the sweep has at more than one maximum batch."""
    seen: dict[str, set[int]] = {}
    for result in results:
        seen.setdefault(result.schedule, set()).add(result.max_batch)
    return {schedule for schedule, batches in seen.items() if len(batches) > 1}


def _rank(result: RunResult) -> int:
    order = list(SCHEDULE_NAMES)
    method = result.schedule.split(" ")[0]
    return order.index(method) if method in order else len(order)


def _batch(result: RunResult) -> int:
    return result.max_batch
