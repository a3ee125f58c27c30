"""Accuracy under attack of a sweep's cells, measured by `hpc-absa attack` when they are done."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpc_absa.report.tables import Cell as TableCell
from hpc_absa.report.tables import Column, Table, schedule_name, schedule_order, summary
from hpc_absa.rundir.files import write_atomic
from hpc_absa.study.sweep import Cell, StudyDir
from hpc_absa.supervisor.process import PYTHON


def measure(
    study: StudyDir,
    attacks: str,
    report: Callable[[str], None],
    program: tuple[str, ...] = (*PYTHON, "-m", "hpc_absa"),
) -> bool:
    """Attack the newest checkpoint of each cell that is done, unless that was done before.

    Args:
        study: the sweep's cells and folder.
        attacks: as of `hpc-absa attack --attacks`.
        report: shows a line, such as why an attack failed.
        program: the program that has the command `attack`.

    Returns:
        Whether all of them are measured.
    """
    complete = True
    for cell in study.cells:
        if study.state(cell) != "done" or (_read(study, cell) or {}).get("attacks") == attacks:
            continue
        command = [*program, "attack", str(study.run(cell).path), "--attacks", attacks, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no output"]
            report(f"{cell.name}: attack failed: {lines[-1].removeprefix('hpc-absa: ')}")
            complete = False
            continue
        step = study.run(cell).newest_step()
        found = {"attacks": attacks, "step": step, **json.loads(done.stdout)}
        _file(study, cell).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(_file(study, cell), json.dumps(found))
        report(f"{cell.name}: {100 * found['accuracy']:.1f} % without, " + _line(found))
    return complete


def table(study: StudyDir) -> Table | None:
    """Accuracy by schedule, maximum batch and attack; None where nothing was measured."""
    groups: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for cell in study.cells:
        if found := _read(study, cell):
            groups.setdefault((cell.schedule, cell.max_batch), []).append(found)
    if not groups:
        return None
    names = dict.fromkeys(
        result["attack"] for runs in groups.values() for run in runs for result in run["results"]
    )
    rows: list[tuple[TableCell, ...]] = []
    for schedule, batch in sorted(groups, key=lambda key: (*schedule_order(key[0]), key[1])):
        runs = groups[schedule, batch]
        each = [{result["attack"]: result for result in run["results"]} for run in runs]
        under = (
            summary([100 * run[name]["accuracy"] for run in each if name in run]) for name in names
        )
        clean = summary([100 * run["accuracy"] for run in runs])
        rows.append((schedule_name(schedule), batch, clean, *under))
    columns = (
        Column("schedule"), Column("batch"), Column("none", "accuracy under attack, %", digits=1),
        *(Column(name, "accuracy under attack, %", digits=1) for name in names),
    )  # fmt: skip
    return Table("Robustness", columns, tuple(rows), "Of the newest checkpoint of each run.")


def _file(study: StudyDir, cell: Cell) -> Path:
    return study.path / "robustness" / f"{cell.name}.json"


def _read(study: StudyDir, cell: Cell) -> dict[str, Any] | None:
    """What was measured; None if nothing was, or the run was continued since."""
    try:
        found = json.loads(_file(study, cell).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or "results" not in found:
        return None
    step = study.run(cell).newest_step()
    return found if found.get("step", step) == step else None  # earlier versions wrote none


def _line(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{100 * r['accuracy']:.1f} % under {r['attack']}" for r in found["results"])
