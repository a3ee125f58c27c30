"""How large a batch job is, and its script."""

import shlex
import sys

import pytest

from hpc_absa.rundir import RunDir
from hpc_absa.supervisor.batch import Size, most_ranks, ranks_per_node, script, size_of
from hpc_absa.supervisor.slurm import Partition
from tests.supervisor.digits import digits

PARTITION = Partition("main", 4, 8)


@pytest.mark.parametrize(
    ("settings", "ranks", "size"),
    [
        # as many per node as it has cores, with one thread each
        ((), 1, Size(1, 1, 1, 1, None)),
        ((), 12, Size(2, 12, 6, 1, None)),
        (("train.threads_per_rank=4",), 4, Size(2, 4, 2, 4, None)),
        (("launch.ranks_per_node=3",), 7, Size(3, 7, 3, 1, None)),
        # one per GPU, and no more GPUs than ranks
        (("launch.slurm.gpus-per-node=4",), 1, Size(1, 1, 1, 1, 1)),
        (("launch.slurm.gpus-per-node=4",), 8, Size(2, 8, 4, 1, 4)),
    ],
)
def test_nodes_hold_the_ranks_and_no_more(settings, ranks, size):
    job = digits("train.threads_per_rank=1", *settings)
    assert size_of(job, ranks, PARTITION) == size
    assert size.nodes * ranks_per_node(job, PARTITION) >= ranks


@pytest.mark.parametrize(
    ("settings", "most"), [((), 4), (("ranks.max=64",), 32), (("ranks.max=7",), 7)]
)
def test_the_partition_bounds_the_ranks(settings, most):
    assert most_ranks(digits("train.threads_per_rank=1", *settings), PARTITION) == most


@pytest.mark.parametrize("folder", ["two words", "100%j", "it's é", "a#b"])
def test_any_folder_can_hold_a_run(tmp_path, folder):
    """Slurm replaces %j by the job's id, and splits the line at spaces as a shell does."""
    run = RunDir(tmp_path / folder)
    text = script(digits(), run, 1, "digits-abc-1", Size(1, 1, 1, 1, None), ())
    (line,) = [line for line in text.splitlines() if line.startswith("#SBATCH --output=")]
    (word,) = shlex.split(line.removeprefix("#SBATCH "))
    assert word.removeprefix("--output=").replace("%%", "\0").count("%") == 0
    assert word == f"--output={run.link_log(1)}".replace("%", "%%")
    assert shlex.split(text.splitlines()[-1])[-2:] == [str(run.path), "1"]


def test_the_script(tmp_path):
    site = tmp_path / "site file.sh"
    job = digits(
        "launch.slurm.partition=gpu",
        "launch.slurm.account=ab1",
        "launch.slurm.qos=high",
        "launch.slurm.constraint=a100",
        "launch.slurm.time=4:00:00",
        "launch.slurm.gpus-per-node=4",
        'launch.slurm.sbatch=["--exclusive", "--mail-type=END"]',
        f"launch.slurm.setup_script={site}",
        "launch.slurm.signal_seconds=90",
    )
    run = RunDir(tmp_path / "run")
    text = script(job, run, 3, "digits-abc-3", Size(2, 8, 4, 2, 4), ("train.lr",))
    assert (
        text
        == f"""#!/bin/bash
# Link 3 of the chain of batch jobs that trains 'digits'.
#SBATCH --job-name=digits-abc-3
#SBATCH --nodes=2
#SBATCH --ntasks=8
#SBATCH --ntasks-per-node=4
#SBATCH --cpus-per-task=2
#SBATCH --gpus-per-node=4
#SBATCH --partition=gpu
#SBATCH --account=ab1
#SBATCH --qos=high
#SBATCH --constraint=a100
#SBATCH --time=4:00:00
#SBATCH --signal=B:USR1@90
#SBATCH --output={run.link_log(3)}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --exclusive
#SBATCH --mail-type=END
source '{site}'
exec {sys.executable} -P -m hpc_absa link {run.path} 3 --allow-changed train.lr
"""
    )
