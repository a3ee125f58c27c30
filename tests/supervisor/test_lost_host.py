"""A host that vanishes in mid-phase, for real: its cable is cut, and later it is back."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from hpc_absa import events
from hpc_absa.rundir import RunDir
from tests.mpi.conftest import find_mpirun, mpi_environment
from tests.mpi.jobs import final_weights, write_job
from tests.slurm.chains import alone
from tests.supervisor.two_hosts import ADDRESSES, TwoHosts, missing

pytestmark = [pytest.mark.namespaces, pytest.mark.mpi, pytest.mark.timeout(400)]

LONG = ("train.epochs=60", "model.width=16")


@pytest.fixture
def hosts(tmp_path):
    if why := missing():
        pytest.skip(why)
    hosts = TwoHosts(tmp_path)
    try:
        hosts.start()
        yield hosts
    finally:
        hosts.stop()


def told(run, kind):
    return [e for e in events.read(run.events) if e["event"] == kind]


def wait_for(run, kind, count, process, timeout=120):
    until = time.monotonic() + timeout
    while len(told(run, kind)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until, f"no {kind}: {events.read(run.events)[-5:]}"
        time.sleep(0.1)


def test_growth_onto_a_second_host_that_vanishes_and_comes_back(hosts, tmp_path):
    run = RunDir(tmp_path / "run")
    job = write_job(tmp_path, most=2, reproducible=True)
    words = [sys.executable, "-m", "hpc_absa", "run", str(job), "--run-dir", str(run.path)]
    words += ["-H", ",".join(f"{address}:1" for address in ADDRESSES)]
    for setting in (
        *LONG,
        f"launch.agent={hosts.agent}",
        "launch.interface=veth0",
        "launch.cool_down=5.0",
    ):
        words += ["--set", setting]
    process = subprocess.Popen(
        hosts.inside(0, *words),
        env=os.environ | mpi_environment(find_mpirun()),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(run, "epoch", 4, process)
        assert told(run, "phase_start")[-1]["hosts"] == sorted(hosts.names)
        begun = len(told(run, "phase_start"))
        hosts.cable("down")
        wait_for(run, "phase_start", begun + 1, process)
        alone_now = told(run, "phase_start")[-1]
        assert (alone_now["ranks"], alone_now["hosts"]) == (1, [hosts.names[0]])
        assert told(run, "host")[-1]["action"] == "set_aside"
        hosts.cable("up")
        wait_for(run, "phase_start", begun + 2, process)
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert [e["action"] for e in told(run, "host")] == ["set_aside", "returned"]
    assert told(run, "phase_start")[-1]["hosts"] == sorted(hosts.names)
    assert len(told(run, "failure")) == 1
    assert f"host {ADDRESSES[1]}: returned" in output
    whole = alone(tmp_path, *LONG)
    assert np.array_equal(final_weights(whole.path), final_weights(run.path))
