"""On real ranks: each sample once an epoch, and the same result at any number of ranks."""

import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from hpc_absa.errors import ExitStatus
from hpc_absa.replay import replay
from hpc_absa.rundir import RunDir
from tests.mpi.conftest import find_mpirun, mpi_environment
from tests.mpi.jobs import final_weights, relative_difference, write_job

pytestmark = pytest.mark.mpi

LEDGER = Path(__file__).with_name("ledger_program.py")
SAMPLES, EPOCHS, LARGEST = 1437, 4, 128


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def fixed(mpirun, folder):
    """The folder of the small job at that many ranks from first to last, run once."""

    @cache
    def run(ranks):
        place = folder / f"fixed{ranks}"
        place.mkdir()
        job = write_job(place, initial=ranks, most=ranks)
        mpirun(ranks, LEDGER, place, job, place / "run", timeout=120)
        return place

    return run


@pytest.fixture(scope="module")
def weights(fixed):
    return lambda ranks: final_weights(fixed(ranks) / "run")


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_fixed_ranks_visit_each_sample_once_an_epoch(fixed, ranks):
    ledgers = [np.load(path) for path in fixed(ranks).glob("*.npy")]
    assert len(ledgers) == ranks
    assert all(len(ledger) for ledger in ledgers), "a rank had no microbatch"
    visits = Counter(map(tuple, np.concatenate(ledgers).tolist()))
    assert max(visits.values()) == 1, "a sample was visited twice in an epoch"
    by_epoch = Counter(epoch for epoch, _ in visits)
    assert [by_epoch[e] for e in range(EPOCHS - 1)] == [SAMPLES] * (EPOCHS - 1)
    # The last step of the run that cannot be filled is not taken.
    assert SAMPLES - LARGEST < by_epoch[EPOCHS - 1] <= SAMPLES


def test_any_number_of_ranks_gives_the_same_weights(weights):
    assert relative_difference(weights(1), weights(2)) < 1e-4
    assert relative_difference(weights(1), weights(4)) < 1e-4


def test_resuming_by_hand_with_other_launchers_gives_the_same_weights(mpirun, folder, weights):
    """mpirun -np 1, then horovodrun -np 2, then mpirun -np 4, each until it ends for more ranks."""
    place = folder / "by-hand"
    place.mkdir()
    job, run = write_job(place), place / "run"
    arguments = ["train", job, "--run-dir", run]
    first = mpirun(1, "hpc_absa", *arguments)
    assert f"next phase: mpirun -np 2 hpc-absa train {job} --run-dir {run}" in first.stdout
    horovodrun = Path(sys.executable).with_name("horovodrun")
    second = subprocess.run(
        [horovodrun, "-np", "2", sys.executable, "-m", "hpc_absa", *map(str, arguments)],
        env=mpi_environment(find_mpirun()),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert second.returncode == 0, second.stdout + second.stderr
    assert "next phase: mpirun -np 4" in second.stdout
    last = mpirun(4, "hpc_absa", *arguments, timeout=120)
    assert "done ·" in last.stdout
    assert relative_difference(weights(1), final_weights(run)) < 1e-4
    ended = [e["outcome"] for e in RunDir(run).log.read() if e["event"] == "phase_end"]
    assert ended == ["resize", "resize", "done"]
    assert not replay(run).differing


BY_LAYER = 'layer_rates = "trace"\nlayer_precision = "trace"\nlayer_precision_limit = 1e-5'


def test_reproducible_runs_give_the_same_bits(mpirun, folder):
    """On one rank, and grown from one to two to four; with what is decided by layer."""
    weights, decided = [], []
    for most, sizes in ((1, [1]), (4, [1, 2, 4])):
        place = folder / f"reproducible{most}"
        place.mkdir()
        job = write_job(place, most=most, reproducible=True, hessian=BY_LAYER)
        for ranks in sizes:
            mpirun(ranks, "hpc_absa", "train", job, "--run-dir", place / "run", timeout=120)
        weights.append(final_weights(place / "run"))
        log = RunDir(place / "run").log.read()
        decided.append(
            [(e["reason"], e.get("factors") or e["changes"], e.get("bfloat16"))
             for e in log if e["event"] in ("layer_rates", "layer_precision")]
        )  # fmt: skip
    assert np.array_equal(*weights)
    assert decided[0] == decided[1]
    chosen = [layers for _, _, layers in decided[0] if layers is not None]
    assert len(chosen) == 3
    assert len(set(map(len, chosen))) > 1, "the same layers throughout"


@pytest.mark.slow
def test_a_stopped_and_resumed_run_is_bit_for_bit_the_uninterrupted_one(mpirun, folder, weights):
    """In the middle of an epoch, without `reproducible`."""
    place = folder / "stopped"
    place.mkdir()
    job, run = write_job(place, initial=4, most=4), RunDir(place / "run")
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(
            mpirun, 4, "hpc_absa", "train", job, "--run-dir", run.path, timeout=120, check=False
        )
        while not first.done() and not any(e["event"] == "epoch" for e in run.log.read()):
            time.sleep(0.01)
        run.stop_request.touch()
        assert first.result().returncode == 75, first.result().stdout
    ended = [e for e in run.log.read() if e["event"] == "phase_end"][-1]
    assert ended["outcome"] == "stopped"
    assert 0 < ended["samples"] < EPOCHS * SAMPLES
    mpirun(4, "hpc_absa", "train", job, "--run-dir", run.path, timeout=120)
    assert np.array_equal(weights(4), final_weights(run.path))


@pytest.mark.slow
def test_three_ranks_share_four_microbatches_unevenly(mpirun, folder, weights):
    place = folder / "three"
    place.mkdir()
    job = write_job(place, initial=3, most=3)
    mpirun(3, "hpc_absa", "train", job, "--run-dir", place / "run", timeout=120)
    assert relative_difference(weights(1), final_weights(place / "run")) < 1e-4


def test_an_error_of_one_rank_ends_all_ranks_and_is_reported(mpirun, folder):
    place = folder / "error"
    place.mkdir()
    (place / "faulty.py").write_text(
        "import torch, os\n"
        "def loss(outputs, targets):\n"
        "    if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "        raise ArithmeticError('on purpose')\n"
        "    return torch.nn.functional.cross_entropy(outputs, targets)\n"
    )
    job = write_job(place, initial=2, most=2)
    text = job.read_text().replace("[train]\n", '[train]\nloss = "faulty:loss"\n')
    job.write_text(text)
    done = mpirun(
        2,
        "hpc_absa",
        "train",
        job,
        "--run-dir",
        place / "run",
        timeout=60,
        check=False,
        env={"PYTHONPATH": str(place)},
    )
    assert done.returncode != 0
    assert "rank 1 on" in done.stdout
    assert "failed: ArithmeticError: on purpose" in done.stdout
    log = RunDir(place / "run").rank_log(1, 1).read_text()
    assert "Traceback" in log
    assert "on purpose" in log


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        pytest.param(
            "raise ValueError(f'garbage {gc.isenabled()}')",
            "schedule.method: faulty_rule:Faulty.decide failed: ValueError: garbage True",
            id="rule",
        ),
        pytest.param(
            "self.folder.rename(self.folder.with_name('gone'))",
            "No such file or directory",
            id="save",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_error_while_ranks_read_ahead_ends_all_ranks_with_one_line(
    mpirun, tmp_path, fault, line
):
    (tmp_path / "faulty_rule.py").write_text(
        "import gc\n"
        "from pathlib import Path\n"
        "from hpc_absa.records import Decision, ScheduleState\n"
        "from hpc_absa.schedules import Rule\n"
        "class Faulty(Rule):\n"
        "    def __init__(self, base_batch, lr, folder):\n"
        "        self.start, self.folder = ScheduleState(base_batch, lr), Path(folder)\n"
        "    def initial(self): return self.start\n"
        "    def decide(self, state, seen):\n"
        f"        {fault}\n"
        "        return Decision('continue', 'none', state)\n"
    )
    job = write_job(tmp_path, initial=2, most=2)
    place = RunDir(tmp_path / "run").checkpoints
    text = job.read_text().replace('"absa"', f'"faulty_rule:Faulty"\nfolder = "{place}"')
    text = text.replace("max_batch = 128\nkappa = 1\n", "")
    job.write_text(text.replace("tol = 0.1", "every = 500"))
    run = ["hpc_absa", "train", job, "--run-dir", tmp_path / "run"]
    done = mpirun(2, *run, timeout=60, check=False, env={"PYTHONPATH": str(tmp_path)})
    (message,) = [line for line in done.stdout.splitlines() if line.startswith("hpc-absa: ")]
    assert line in message
    assert done.returncode in (ExitStatus.USAGE, ExitStatus.FAILED)
    assert "Traceback" not in done.stdout + done.stderr
