"""The environment that these tests run in works without being activated."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.prefix) / "bin"
SELFCHECK = str(ROOT / "launch/selfcheck.py")


@pytest.fixture(scope="module")
def found():
    """What bootstrap.sh recorded of this environment."""
    record = Path(sys.prefix) / "hpc-absa-env.json"
    if not record.exists():
        pytest.skip(f"{sys.prefix} was not made by launch/bootstrap.sh")
    return json.loads(record.read_text())


def run(*command: object) -> str:
    """Run a command as a login shell without `activate` would; returns all it printed."""
    env = {k: v for k, v in os.environ.items() if k not in ("OPAL_PREFIX", "VIRTUAL_ENV")}
    env |= {
        "PATH": ":".join(p for p in os.environ["PATH"].split(":") if p != str(BIN)),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
    }
    words = [str(word) for word in command]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.mpi
def test_a_single_process_starts_mpi(found):
    assert found["mpi"]["library"] in run(sys.executable, SELFCHECK)


@pytest.mark.mpi
def test_horovod_and_mpi4py_agree_under_mpirun(found):
    printed = run(found["mpi"]["mpirun"], "-np", 2, sys.executable, SELFCHECK, "--ranks", 2)
    assert printed.count("sums agree") == 2


@pytest.mark.mpi
def test_horovod_and_mpi4py_agree_under_horovodrun(found):
    printed = run(BIN / "horovodrun", "-np", 2, "--mpi", sys.executable, SELFCHECK, "--ranks", 2)
    assert printed.count("sums agree") == 2
