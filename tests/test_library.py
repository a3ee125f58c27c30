"""The public names, the examples, and what the page about them says."""

import difflib
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hpc_absa
from hpc_absa.rundir import RunDir

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def test_the_package_imports_nothing_and_has_every_public_name():
    code = (
        "import sys, time; t = time.perf_counter(); import hpc_absa; t = time.perf_counter() - t; "
        "print(t, *(name for name in ('torch', 'numpy', 'h5py') if name in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    seconds, *loaded = done.stdout.split()
    assert float(seconds) < 0.05
    assert loaded == []
    for name in hpc_absa.__all__:
        assert getattr(hpc_absa, name).__name__
        assert name in dir(hpc_absa)
    with pytest.raises(AttributeError, match="has no attribute 'Runs'"):
        hpc_absa.Runs  # noqa: B018


def test_mypy_sees_the_public_names():
    text = (ROOT / "hpc_absa/__init__.py").read_text()
    imported = re.findall(r"^    from \S+ import (.*)$", text, re.M)
    names = {name for line in imported for name in line.split(", ")}
    assert names == set(hpc_absa.__all__) == set(hpc_absa._MODULES)


def diff():
    """From the plain script to the elastic one."""
    before, after = ((EXAMPLES / f"{name}.py").read_text() for name in ("plain", "elastic"))
    lines = difflib.unified_diff(
        before.splitlines(), after.splitlines(), "plain.py", "elastic.py", lineterm="", n=1
    )
    return list(lines)


def test_the_elastic_script_differs_from_the_plain_one_in_a_few_lines_that_the_page_shows():
    lines = diff()
    assert len([line for line in lines if line.startswith("+")][1:]) <= 12
    assert "\n".join(lines) in (ROOT / "docs/library.md").read_text()


@pytest.mark.parametrize("name", ["elastic", "language_model", "tabular", "multilabel", "finetune"])
def test_an_example_runs_and_learns(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    torch.set_num_threads(threads)
    log = RunDir(tmp_path / "runs" / name).log
    losses = [event["test_loss"] for event in log.read() if event["event"] == "epoch"]
    assert losses[-1] < 0.9 * losses[0]
    grown = [e for e in log.read() if e["event"] == "decision" and e["action"] == "grow"]
    assert grown
    assert log.last("done")


def test_the_plain_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / "plain.py"), run_name="__main__")
    assert (tmp_path / "digits.pt").exists()
