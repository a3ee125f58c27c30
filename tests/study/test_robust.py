"""Accuracy under attack of a sweep's cells, from a command that pretends to attack."""

import json
import sys

import pytest

from hpc_absa.report.tables import Measured
from hpc_absa.study import robust, tables
from hpc_absa.study.sweep import StudyDir, load
from tests.report.synthetic import Log

SWEEP = """
name = "s"
seeds = [0, 1]
[job.data]
name = "digits"
[job.model]
name = "digits-cnn"
[job.train]
epochs = 2
microbatch = 32
lr = 0.1
[job.schedule]
method = "bl"
base_batch = 32
[[grid]]
schedule = ["bl"]
max_batch = [32, 64]
"""
PROGRAM = """
import json, sys
_, command, run, option, attacks, as_json = sys.argv
assert (command, option, as_json) == ("attack", "--attacks", "--json")
if "64-seed1" in run:
    sys.exit("hpc-absa: a reason")
accuracy = 0.5 + 0.2 * run.endswith("seed1")
results = [{"attack": name, "accuracy": accuracy} for name in attacks.split(",")]
print(json.dumps({"accuracy": 0.9, "results": results}))
"""


@pytest.fixture
def study(tmp_path):
    (tmp_path / "sweep.toml").write_text(SWEEP)
    _, cells = load(tmp_path / "sweep.toml")
    study = StudyDir(tmp_path / "out", cells)
    for cell in cells:
        log = Log(study.run(cell).create().path, None)
        log.start()
        log.train_epoch(0.9).save()
        log.end("done", log.step, comp=3.0)
        log.event("done", steps=log.step, epochs=cell.job.train.epochs, test_accuracy=0.9)
    return study


def test_every_cell_that_is_done_is_attacked_once(study, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    lines = []
    program = (sys.executable, str(script))
    assert robust.table(study) is None
    assert "robustness" not in tables.of(study)
    assert not robust.measure(study, "fgsm,pgd", lines.append, program)
    assert lines[0] == "bl-32-seed0: 90.0 % without, 50.0 % under fgsm, 50.0 % under pgd"
    assert lines[3] == "bl-64-seed1: attack failed: a reason"
    table = tables.of(study)["robustness"]
    assert [column.heading for column in table.columns][2:] == [
        f"accuracy under attack, % {name}" for name in ("none", "fgsm", "pgd")
    ]
    first, second = table.rows
    assert first[:2] == ("BL", 32)
    assert first[3] == Measured(60.0, pytest.approx(14.142, rel=1e-3), 2)
    assert second[3].n == 1
    lines.clear()
    assert not robust.measure(study, "fgsm,pgd", lines.append, program)  # only what failed
    assert lines == ["bl-64-seed1: attack failed: a reason"]
    kept = json.loads((study.path / "robustness" / "bl-32-seed0.json").read_text())
    assert kept["attacks"] == "fgsm,pgd"


def test_a_cell_that_was_continued_is_attacked_again(study, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    lines, run = [], study.run(study.cells[0])
    for step in (10, 20):
        run.checkpoint(step, 1).touch()
        robust.measure(study, "fgsm", lines.append, (sys.executable, str(script)))
    attacked = [line.partition(":")[0] for line in lines if "without" in line]
    assert attacked == ["bl-32-seed0", "bl-32-seed1", "bl-64-seed0", "bl-32-seed0"]
    assert robust.table(study).rows[0][3].n == 2
    run.checkpoint(30, 1).touch()
    assert robust.table(study).rows[0][3].n == 1
