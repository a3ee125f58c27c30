"""Where ranks find their places: named hosts, a scheduler's, or this machine."""

import pytest

from hpc_absa.supervisor.hosts import HostPool
from hpc_absa.supervisor.resources import Allocated, Fixed, resources_of
from tests.supervisor.digits import digits


@pytest.fixture(autouse=True)
def _outside_of_any(monkeypatch):
    for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"):
        monkeypatch.delenv(name, raising=False)


def found(*overrides):
    return resources_of(digits(*overrides), lambda *_: None)


def placed(resources, ranks):
    return resources.placed(digits(), ranks).launch.hosts


def test_this_machine():
    resources = found("ranks.max=3")
    assert isinstance(resources, Fixed)
    assert (resources.here(), resources.most(), placed(resources, 3)) == (3, 3, "")


def test_named_hosts_before_all_others(monkeypatch):
    monkeypatch.setenv("PBS_JOBID", "1")
    resources = found("launch.hosts=a:2,b:2", "ranks.max=3")
    assert isinstance(resources, HostPool)
    assert (resources.here(), placed(resources, 3)) == (3, "a:2,b:1")


@pytest.mark.parametrize(
    ("job", "file"), [("PBS_JOBID", "PBS_NODEFILE"), ("LSB_JOBID", "LSB_DJOB_HOSTFILE")]
)
def test_the_hosts_of_an_allocation(monkeypatch, tmp_path, job, file):
    (tmp_path / "nodes").write_text("c\nc\nd\n")
    monkeypatch.setenv(job, "1")
    monkeypatch.setenv(file, str(tmp_path / "nodes"))
    resources = found("ranks.max=8")
    assert (resources.here(), placed(resources, 3)) == (3, "c:2,d:1")


def test_within_slurm_its_launchers_know_the_hosts(monkeypatch):
    for name, value in (("ID", "1"), ("NODELIST", "n[1-2]")):
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2)")
    for launcher in ("mpirun", "srun"):
        resources = found("ranks.max=8", f"launch.launcher={launcher}")
        assert isinstance(resources, Fixed)
        assert (resources.here(), placed(resources, 3)) == (4, "")
    assert placed(found("ranks.max=8", "launch.launcher=horovodrun"), 3) == "n1:2,n2:1"


def test_a_link_may_ask_for_more_than_it_has():
    resources = Allocated(2, 8)
    assert (resources.here(), resources.most()) == (2, 8)
    job = resources.placed(digits("launch.launcher=slurm", "launch.slurm.step=srun"), 2)
    assert job.launch.launcher == "srun"
