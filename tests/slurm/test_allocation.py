"""Within one allocation: phases take a growing part of it."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.mpi.jobs import final_weights
from tests.slurm.chains import ChainRun, alone
from tests.slurm.cluster import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
BIN = Path(sys.executable).parent


def submit(cluster, folder, script, *options, arguments=()):
    """Run a batch script to its end; returns the run and what it printed."""
    chain = ChainRun(cluster, folder)
    output = folder / "output"
    cluster.environment, before = cluster.environment | chain.environment, cluster.environment
    try:
        job = cluster.command(
            *("sbatch", "--parsable", f"--output={output}", *options, str(script)),
            *(str(chain.job), "--run-dir", str(chain.run.path), *arguments),
        )
    finally:
        cluster.environment = before
    wait_until(lambda: job not in cluster.jobs(), 120, f"end of job {job}")
    return chain, output.read_text()


def test_the_shipped_script_grows_onto_the_second_node(cluster, tmp_path):
    """As a site would adapt it: two nodes of one rank."""
    venv = tmp_path / "venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "activate").write_text(f'PATH="{BIN}:$PATH"\n')
    options = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--time=5")
    chain, output = submit(
        cluster,
        tmp_path,
        LAUNCH / "slurm.sh",
        *options,
        f"--export=ALL,VENV={tmp_path}/venv",
        arguments=("--set", "ranks.max=4"),
    )
    starts = chain.events("phase_start")
    assert [e["ranks"] for e in starts] == [1, 2, 2], output
    assert np.array_equal(final_weights(alone(tmp_path).path), final_weights(chain.run.path))


def test_srun_starts_the_ranks(cluster, tmp_path):
    """On one node: the several nodes of one machine share the folder of Slurm's PMIx plugin."""
    output = cluster.command("srun", "--mpi=pmix", "--ntasks=1", "true")
    if "plugin" in output:
        pytest.skip(f"Slurm's PMIx plugin does not work (Debian: libpmix-dev): {output}")
    script = tmp_path / "job.sh"
    script.write_text(f'#!/bin/sh\nexec {BIN}/hpc-absa run "$@" --launcher srun\n')
    chain, output = submit(
        cluster,
        tmp_path,
        script,
        *("--nodes=1", "--ntasks=2", "--cpus-per-task=1"),
        arguments=("--set", 'launch.extra=["--mpi=pmix"]'),
    )
    assert [e["ranks"] for e in chain.events("phase_start")][:2] == [1, 2], output
    assert chain.events("done"), output
    assert chain.events("phase_start")[1]["backend"] == "Horovod over MPI"
    assert np.array_equal(final_weights(alone(tmp_path).path), final_weights(chain.run.path))


def test_srun_without_an_mpi_plugin_is_refused(cluster, tmp_path):
    """Each task would be a complete run of one rank, all in one run directory.

    Open MPI ends a task that srun started without a plugin; other libraries run it alone, as it
    is when the step's number is not set.
    """
    script = tmp_path / "job.sh"
    script.write_text(
        f'#!/bin/sh\n{BIN}/hpc-absa run "$@" --launcher srun\necho "exit status $?"\n'
    )
    chain, output = submit(
        cluster,
        tmp_path,
        script,
        *("--nodes=1", "--ntasks=2", "--cpus-per-task=1"),
        arguments=(
            "--set",
            'launch.extra=["--mpi=none", "env", "-u", "SLURM_STEP_ID"]',
            "--set",
            "ranks.initial=2",
        ),
    )
    assert "HPC_ABSA_RANKS is 2, but MPI_COMM_WORLD has size 1" in output
    assert "exit status 2" in output
    assert chain.events("phase_start") == []
