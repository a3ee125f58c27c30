"""Users' scripts on real ranks: by hand, and relaunched by `hpc-absa launch`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

import hpc_absa as absa
from hpc_absa.rundir import RunDir
from tests.mpi import script_program
from tests.mpi.conftest import ROOT, find_mpirun, mpi_environment


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_script_computes_the_same_on_several_ranks(mpirun, tmp_path, ranks):
    mpirun(ranks, "tests.mpi.script_program", tmp_path, timeout=200)
    parallel = json.loads((tmp_path / "spectra.json").read_text())
    for name, serial in script_program.spectra(None).items():  # tested against dense Hessians
        assert parallel[name] == pytest.approx(serial, rel=1e-6, abs=1e-9), name
    script_program.train(tmp_path / "serial")
    one, several = (absa.load_checkpoint(tmp_path / name) for name in ("serial", "run"))
    assert one.global_batch == several.global_batch == 16
    for name, tensor in one.model.items():
        assert torch.equal(tensor, several.model[name]), name


@pytest.mark.slow
@pytest.mark.mpi
def test_an_example_that_is_killed_once_grows_to_four_ranks_with_the_same_bits(tmp_path):
    """As the page says: from 1 rank to 2 and 4 by its decisions, and one rank killed midway."""
    text = (ROOT / "examples/elastic.py").read_text()
    text = text.replace("evaluate=evaluate)", "evaluate=evaluate, reproducible=True)")
    environment = mpi_environment(find_mpirun() or Path())
    for name in ("alone", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "elastic.py").write_text(text)
    subprocess.run(
        [sys.executable, "elastic.py"], cwd=tmp_path / "alone", env=environment, check=True
    )
    launch = [sys.executable, "-m", "hpc_absa", "launch", "--max-ranks", "4", "--"]
    process = subprocess.Popen(
        [*launch, "python", "elastic.py"], cwd=tmp_path / "killed", env=environment
    )
    run = RunDir(tmp_path / "killed/runs/elastic")
    deadline = time.monotonic() + 200
    while process.poll() is None and not _kill_second_phase(run):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.wait(200) == 0
    events = run.log.read()
    assert [e for e in events if e["event"] == "failure"]
    assert {e["ranks"] for e in events if e["event"] == "phase_start"} == {1, 2, 4}
    alone, killed = (torch.load(tmp_path / name / "digits.pt") for name in ("alone", "killed"))
    for name, tensor in alone.items():
        assert torch.equal(tensor, killed[name]), name
    shutil.rmtree(tmp_path)


def _kill_second_phase(run: RunDir) -> bool:
    """Kill a rank once an epoch of the second phase is done; whether it was."""
    last = run.log.last("epoch")
    if not last or last["ranks"] != 2:
        return False
    for process in psutil.process_iter():
        words = process.cmdline()
        if words[1:] == ["elastic.py"] and process.cwd() == str(run.path.parent.parent):
            os.kill(process.pid, signal.SIGKILL)
            return True
    return False


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("what", "status", "line"),
    [
        ("break", 2, "after step 2, rank 1 left the loop or the with block, and rank 0 continued"),
        pytest.param(
            *("sum", 2, "after step 2, rank 0 called run.sum, and rank 1 continued its loop"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("evaluate", 2, "after step 3, rank 1 ended evaluate, and rank 0 called run.sum"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("after", 2, "rank 1 called run.sum, and rank 0 left the loop or the with block"),
            marks=pytest.mark.slow,
        ),
        pytest.param("raise", 1, "failed: ValueError: mine", marks=pytest.mark.slow),
        pytest.param("all", 0, "the end of the script", marks=pytest.mark.slow),
        pytest.param("exit", 0, "the end of the script", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_does_something_else_ends_all_ranks_with_one_line(
    mpirun, tmp_path, what, status, line
):
    done = mpirun(2, "tests.mpi.calls_program", tmp_path / "run", what, check=False, timeout=150)
    assert done.returncode == status, done.stdout + done.stderr
    assert [line in text for text in (done.stdout + done.stderr).splitlines()].count(True) == 1
