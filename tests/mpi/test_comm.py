import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpi.conftest import find_mpirun, mpi_environment

pytestmark = pytest.mark.mpi

PROGRAM = Path(__file__).with_name("comm_program.py")


@pytest.mark.parametrize("ranks", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_all_methods_over_mpi(mpirun, ranks):
    mpirun(ranks, PROGRAM, ranks, "Horovod over MPI")


def test_all_methods_without_a_launcher():
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI", "HOROVOD"))
    }
    subprocess.run(
        [sys.executable, PROGRAM, "1", "serial"], check=True, timeout=60, env=environment
    )


def test_all_methods_over_gloo_without_mpi():
    horovodrun = Path(sys.executable).with_name("horovodrun")
    done = subprocess.run(
        [horovodrun, "--gloo", "-np", "2", sys.executable, PROGRAM, "2", "Horovod over Gloo"],
        env=mpi_environment(find_mpirun()),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
