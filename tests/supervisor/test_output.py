"""Whatever becomes of its output, a run ends by itself and with its own exit status."""

import os
import subprocess
import sys

import pytest

from hpc_absa.rundir import RunDir
from tests.mpi.jobs import write_job

pytestmark = pytest.mark.mpi

SHORT = "--set train.epochs=2 --set schedule.base_batch=64"
"""With one λ, on one rank."""
RUN = f"{sys.executable} -m hpc_absa run small.toml --run-dir D --max-ranks 1 {SHORT}"
TRAIN = f"{sys.executable} -m hpc_absa train small.toml --run-dir D {SHORT} --set ranks.max=1"


@pytest.mark.parametrize(
    "words",
    [
        f"{RUN} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}",
        pytest.param(f"{RUN} >/dev/full 2>&1", marks=pytest.mark.slow),
        f"{RUN} >&- 2>&- <&-",
        f"PYTHONIOENCODING=ascii {RUN} >out && ! grep -P '[^\\x00-\\x7f]' out && grep lambda out",
        pytest.param(f"LC_ALL=C PYTHONCOERCECLOCALE=0 PYTHONUTF8=0 {RUN}", marks=pytest.mark.slow),
        f"{TRAIN} >&-",
        pytest.param(f"{TRAIN} 2>&1 | head -1; exit ${{PIPESTATUS[0]}}", marks=pytest.mark.slow),
        f"PYTHONIOENCODING=ascii {TRAIN} >/dev/full",
    ],
)
def test_a_run_whose_output_is_lost_is_done(tmp_path, words):
    write_job(tmp_path)
    environment = os.environ | {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run(
        ["bash", "-c", words], cwd=tmp_path, env=environment, timeout=180, capture_output=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = RunDir(tmp_path / "D")
    assert [e["event"] for e in run.log.read()][-1] == "done"
    assert run.log.last("failure") is None
    assert "λ" in "".join(path.read_text("utf-8") for path in run.logs.glob("phase-*.log"))
