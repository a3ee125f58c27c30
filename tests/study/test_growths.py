"""Growths of a sweep by cause, and the figure of λ for all cells."""

import math

import pytest

from hpc_absa.report.tables import Measured
from hpc_absa.study import growths, tables
from hpc_absa.study import sweep as sweeps
from hpc_absa.study.sweep import StudyDir
from tests.report.synthetic import Log
from tests.study.test_sweep import BASE

SWEEP = """
name = "small"
job = "base.toml"
seeds = [0, 1]
[[grid]]
schedule = ["bl", "abs"]
max_batch = [128]
[[grid]]
schedule = ["abs"]
max_batch = [128]
set = ["schedule.alpha=inf"]
label = "patience alone"
"""

# λ, its sampling error, cause of growth, batch before, reason
ABS_0 = [
    (40.0, 4.0, None, 32, "λ 40 is the reference"),
    (18.0, 2.0, "eigenvalue", 32, "λ 18 ≤ 40/2: batch 32 → 64"),
    (17.0, None, None, 64, "λ 17 > 18/2"),
    (8.0, 1.0, "eigenvalue", 64, "λ 8 ≤ 18/2: batch 64 → 128"),
    (None, None, None, 128, "batch is at its maximum 128"),
]
ABS_1 = [
    (40.0, 4.0, None, 32, "λ 40 is the reference"),
    (30.0, 2.0, "patience", 32, "no growth for 2 decisions: batch 32 → 64"),
    (19.0, 2.0, "eigenvalue", 64, "λ 19 ≤ 40/2: batch 64 → 128"),
]
PATIENCE = [(None, None, "patience", 32, "no growth for 1 decisions: batch 32 → 64")]


@pytest.fixture(name="study")
def _study(tmp_path):
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "sweep.toml").write_text(SWEEP)
    _, cells = sweeps.load(tmp_path / "sweep.toml")
    study = StudyDir(tmp_path / "out", cells)
    rows = {"abs-128-seed0": ABS_0, "abs-128-seed1": ABS_1}
    for cell in cells[:-1]:  # the last one is not done
        write(study.run(cell).path, rows.get(cell.name, PATIENCE if "alone" in cell.name else []))
    return study


def write(path, rows, with_cause=True):
    log = Log(path).start()
    for epoch, (value, error, cause, batch, reason) in enumerate(rows, start=1):
        fields = {"cause": cause} if with_cause else {}
        log.event(
            "decision", epoch=float(epoch), step=epoch, samples=epoch, eigenvalue=value,
            sampling_error=error, action="grow" if cause else "continue", reason=reason,
            batch=batch, **fields,
        )  # fmt: skip
    log.event("decision", epoch=9.0, step=9, samples=9, action="finish", batch=32, reason="")
    log.event("done", steps=9, epochs=9, test_accuracy=0.9)


def test_the_table_counts_growths_by_cause(study):
    table = growths.table(study)
    assert [row[0] for row in table.rows] == ["ABS", "ABS patience alone"]
    _, batch, count, by_eigenvalue, by_patience, other, share, first, points = table.rows[0]
    assert (batch, count) == (128, Measured(2.0, 0.0, 2))
    assert (by_eigenvalue.mean, by_patience.mean, other.mean) == (1.5, 0.5, 0.0)
    assert share == 75.0
    assert first.mean == 2.0
    assert points.mean == pytest.approx(7 / 4)  # decisions with a batch below the maximum
    assert table.rows[1][3:6] == (Measured(0.0, math.nan, 1), *table.rows[1][4:6])
    assert table.rows[1][4].mean == 1.0
    assert "| ABS | 128 | 2.0 ± 0.0 | 1.5 ± 0.7 | 0.5 ± 0.7 |" in table.to_markdown()


def test_the_table_and_the_figure_are_among_the_files_of_a_study(study):
    tables.write(study)
    assert {"accuracy", "time", "growths"} == set(tables.of(study))
    assert "by patience" in (study.tables / "growths.csv").read_text()
    assert (study.tables / "eigenvalues.png").read_bytes().startswith(b"\x89PNG")
    svg = (study.tables / "eigenvalues.svg").read_bytes()
    assert svg == growths.figure(study, "svg"), "the same runs give the same bytes"


def test_causes_of_logs_without_the_field(tmp_path):
    reasons = ["λ 18 ≤ 40/2: batch 32 → 64", "λ is not finite; no growth for 3 decisions: batch",
               "milestone at epoch 3: batch 32 → 64"]  # fmt: skip
    causes = [growths.cause_of({"action": "grow", "reason": reason}) for reason in reasons]
    assert causes == ["eigenvalue", "patience", "schedule"]
    assert growths.cause_of({"reason": reasons[0], "cause": "patience"}) == "patience"


def test_without_any_growth_the_table_is_empty_and_without_any_eigenvalue_there_is_no_figure(
    tmp_path,
):
    (tmp_path / "base.toml").write_text(BASE)
    (tmp_path / "sweep.toml").write_text(SWEEP)
    study = StudyDir(tmp_path / "out", sweeps.load(tmp_path / "sweep.toml")[1])
    assert growths.table(study).rows == ()
    assert growths.figure(study) is None
