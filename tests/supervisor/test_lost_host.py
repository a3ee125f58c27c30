"""A host that is lost during a phase: its network link is down, and later up again."""

import numpy as np
import pytest

from hpc_absa.rundir import RunDir
from tests.mpi.conftest import find_mpirun, mpi_environment
from tests.mpi.jobs import final_weights, write_job
from tests.slurm.chains import alone
from tests.supervised import Supervised
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


def test_growth_onto_a_second_host_that_is_lost_and_returns(hosts, tmp_path):
    words = ["-H", ",".join(f"{address}:1" for address in ADDRESSES)]
    for setting in (
        *LONG,
        f"launch.rsh_agent={hosts.agent}",
        "launch.interface=veth0",
        "launch.cool_down=5.0",
    ):
        words += ["--set", setting]
    run = Supervised(
        write_job(tmp_path, most=2, reproducible=True),
        RunDir(tmp_path / "run"),
        *words,
        environment=mpi_environment(find_mpirun()),
    )
    run.words = hosts.inside(0, *run.words)
    run.start()
    try:
        run.wait_for("epoch", 4)
        assert run.events("phase_start")[-1]["hosts"] == sorted(hosts.names)
        starts = len(run.events("phase_start"))
        hosts.network("down")
        run.wait_for("phase_start", starts + 1)
        restarted = run.events("phase_start")[-1]
        assert (restarted["ranks"], restarted["hosts"]) == (1, [hosts.names[0]])
        assert run.events("host")[-1]["action"] == "set_aside"
        hosts.network("up")
        run.wait_for("phase_start", starts + 2)
        code, output = run.finish(200)
    finally:
        run.process.kill()
    assert code == 0, output
    assert [e["action"] for e in run.events("host")] == ["set_aside", "returned"]
    assert run.events("phase_start")[-1]["hosts"] == sorted(hosts.names)
    assert len(run.events("failure")) == 1
    assert f"host {ADDRESSES[1]}: returned" in output
    whole = alone(tmp_path, *LONG)
    assert np.array_equal(final_weights(whole.path), final_weights(run.run.path))
