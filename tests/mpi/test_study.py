"""attack, quantize, analyse and AdaHessian's diagonal: two ranks have the results of one."""

import json
from pathlib import Path

import pytest
import torch

from hpc_absa.comm import SerialCommunicator
from hpc_absa.rundir import RunDir
from tests.mpi import study_program
from tests.training import runs

pytestmark = pytest.mark.mpi


def compare(path, a, b):
    """Equal, numbers up to the order of summation."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            compare(f"{path}/{key}", a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            compare(f"{path}/{index}", x, y)
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=2e-3, abs=1e-5), path
    else:
        assert a == b, path


def test_two_ranks_have_the_results_of_one(mpirun, tmp_path):
    threads = torch.get_num_threads()
    runs.train(tmp_path, "train.lr=0.1", "train.epochs=2", "schedule.max_batch=16")
    checkpoint = RunDir(tmp_path).checkpoint_files()[-1]
    expected = json.loads(json.dumps(study_program.results(checkpoint, SerialCommunicator())))
    torch.set_num_threads(threads)
    output = mpirun(2, Path(study_program.__file__), checkpoint, timeout=120).stdout
    answer = json.loads(next(line for line in output.splitlines() if line.startswith("{")))
    assert answer["size"] == 2
    assert answer["same"], "ranks differ"
    compare("", expected, answer["found"])
    bits = (found["diagonal"]["reproducible"] for found in (expected, answer["found"]))
    assert len(set(bits)) == 1


def test_an_error_of_one_rank_ends_a_command_on_all_ranks(mpirun, tmp_path):
    program = tmp_path / "fails.py"
    program.write_text(
        "import sys\n"
        "from hpc_absa.errors import UsageError\n"
        "from hpc_absa.training.load import on_ranks\n"
        "def command(comm):\n"
        "    if comm.rank == 1:\n"
        "        raise UsageError('only here')\n"
        "    comm.allgather_object(0)\n"
        "    return 0\n"
        "sys.exit(on_ranks(command))\n"
    )
    done = mpirun(2, program, check=False)
    assert done.returncode == 2
    assert "hpc-absa: rank 1: only here" in done.stderr
