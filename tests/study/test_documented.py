"""The examples in docs/schedules.md work."""

import re
import sys
from pathlib import Path

import pytest

from hpc_absa import config
from hpc_absa.plan import plan
from hpc_absa.study import sweep as sweeps

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "schedules.md").read_text(encoding="utf-8")


def block(language):
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return text


def test_user_defined_rule(tmp_path, monkeypatch):
    (tmp_path / "my_rules.py").write_text(block("python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (table,) = re.findall(r"    \[schedule\]\n(?:    .*\n)+", PAGE)
    text = re.sub(r"(?m)^    ", "", table)
    head = 'name="a"\ndata={name="digits"}\nmodel={name="m"}\n'
    head += "train={epochs=10, microbatch=64, lr=0.1}\n"
    planned = plan(config.parse(head + text, "page"), 6400, 8)["plan"]
    assert [(p.global_batch, round(p.epochs)) for p in planned.phases] == [
        (64, 3),
        (128, 3),
        (256, 3),
        (512, 1),
    ]


def test_sweep_file(tmp_path):
    (tmp_path / "digits.toml").write_text((ROOT / "jobs" / "digits.toml").read_text())
    (tmp_path / "sweep.toml").write_text(block("toml"))
    sweep, cells = sweeps.load(tmp_path / "sweep.toml")
    assert len(cells) == 3 * (1 + 4 * 2 + 1)
    assert sweep.side_by_side == 2
    assert cells[-1].name == "absa-r-=-0.4-256-seed2"
    assert {cell.job.train.epochs for cell in cells} == {10}


def test_every_method_is_in_the_table():
    for method in config.SCHEDULES:
        assert re.search(rf"(?m)^\| `{re.escape(method)}` \|", PAGE), method


@pytest.mark.parametrize("path", re.findall(r"`(jobs/[\w./-]+\.toml)`", PAGE))
def test_named_files_exist(path):
    assert (ROOT / path).exists()
