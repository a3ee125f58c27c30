"""The talk's two tables of a sweep and one of its growths, from its cells' run directories."""

from __future__ import annotations

import math
from dataclasses import replace

from hpc_absa.report import page, tables
from hpc_absa.report.history import load
from hpc_absa.report.published import published_table
from hpc_absa.report.tables import RunResult, Table, run_result
from hpc_absa.rundir.files import write_atomic
from hpc_absa.study import growths, robust
from hpc_absa.study.sweep import Cell, StudyDir


def of(study: StudyDir) -> dict[str, Table]:
    """`accuracy`, `time` and `growths`, of the cells that are done; a note counts the others.

    `robustness` as well, where cells were attacked.

    The talk's numbers are shown next to those of a sweep whose job is the talk's.
    """
    results = [_result(study, cell) for cell in study.cells]
    done = [result for result in results if result.seconds]
    job = study.cells[0].job
    base_batch = min(cell.job.schedule.base_batch for cell in study.cells)
    talk = published_table(job.data.name, job.model.name, base_batch)
    batches = {(result.schedule, result.max_batch) for result in results}
    schedules = [schedule for schedule, _ in batches]

    def label(result: RunResult) -> str:
        name = tables.schedule_name(result.schedule)
        return f"{name} {result.max_batch}" if schedules.count(result.schedule) > 1 else name

    done.sort(key=lambda result: (tables.schedule_order(result.schedule)[0], result.max_batch))
    baseline = next((label(result) for result in done if result.schedule == "bl"), "")
    robustness = robust.table(study)
    return {
        "accuracy": tables.accuracy_table(results, published=talk == "accuracy"),
        "time": tables.time_table(done, baseline=baseline, label=label, published=talk == "time"),
        "growths": growths.table(study),
        **({"robustness": robustness} if robustness else {}),
    }


def write(study: StudyDir) -> None:
    study.tables.mkdir(parents=True, exist_ok=True)
    for name, table in of(study).items():
        for suffix, text in table.formats().items():
            content = page.document(table.title, table.to_html()) if suffix == "html" else text
            write_atomic(study.tables / f"{name}.{suffix}", content)
    for suffix in ("png", "svg"):
        if (image := growths.figure(study, suffix)) is not None:
            write_atomic(study.tables / f"eigenvalues.{suffix}", image)


def _result(study: StudyDir, cell: Cell) -> RunResult:
    if study.state(cell) == "done":
        result = run_result(load(study.run(cell).path), cell.max_batch, cell.seed)
        return replace(result, schedule=cell.schedule)
    return RunResult(cell.schedule, cell.max_batch, cell.seed, math.nan, math.nan)
