"""Where ranks can run, and what happens to hosts that fail; no process is started."""

import threading

import pytest

from hpc_absa.errors import UsageError
from hpc_absa.rundir import RunDir
from hpc_absa.supervisor import launchers
from hpc_absa.supervisor.program import JobProgram
from hpc_absa.supervisor.resources import (
    BatchJobTasks,
    HostPool,
    Resources,
    fill,
    is_here,
    is_reachable,
    resources_of,
)
from hpc_absa.supervisor.supervisor import Supervisor
from hpc_absa.worldsize import stated_hosts
from tests.supervisor.digits import digits

HOSTS = [("a", 2), ("b", 2), ("c", 1)]


@pytest.fixture(autouse=True)
def _outside_any_allocation(monkeypatch):
    for name in ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID"):
        monkeypatch.delenv(name, raising=False)


def resources(*overrides):
    return resources_of(digits(*overrides), lambda *_: None)


def hosts(resources, ranks):
    return resources.place(digits(), ranks).launch.hosts


def test_this_machine():
    local = resources("ranks.max=3")
    assert type(local) is Resources
    assert (local.available(), local.maximum(), hosts(local, 3)) == (3, 3, "")


def test_named_hosts_before_all_others(monkeypatch):
    monkeypatch.setenv("PBS_JOBID", "1")
    named = resources("launch.hosts=a:2,b:2", "ranks.max=3")
    assert isinstance(named, HostPool)
    assert (named.available(), hosts(named, 3)) == (3, "a:2,b:1")


@pytest.mark.parametrize(
    ("job", "file"), [("PBS_JOBID", "PBS_NODEFILE"), ("LSB_JOBID", "LSB_DJOB_HOSTFILE")]
)
def test_the_hosts_of_an_allocation(monkeypatch, tmp_path, job, file):
    (tmp_path / "nodes").write_text("c\nc\nd\n")
    monkeypatch.setenv(job, "1")
    monkeypatch.setenv(file, str(tmp_path / "nodes"))
    allocated = resources("ranks.max=8")
    assert (allocated.available(), hosts(allocated, 3)) == (3, "c:2,d:1")


def test_within_slurm_its_launchers_know_the_hosts(monkeypatch):
    for name, value in (("ID", "1"), ("NODELIST", "n[1-2]")):
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2(x2)")
    for launcher in ("mpirun", "srun"):
        allocated = resources("ranks.max=8", f"launch.launcher={launcher}")
        assert type(allocated) is Resources
        assert (allocated.available(), hosts(allocated, 3)) == (4, "")
    assert hosts(resources("ranks.max=8", "launch.launcher=horovodrun"), 3) == "n1:2,n2:1"


def test_more_initial_ranks_than_slots_are_refused(monkeypatch):
    with pytest.raises(UsageError, match=r"= 3: expected at most 2, the slots of the hosts"):
        resources("ranks.initial=3", "launch.hosts=a:2")
    for name, value in (("ID", "1"), ("NODELIST", "n1")):
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2")
    with pytest.raises(UsageError, match=r"the slots of this batch job; start with fewer"):
        resources("ranks.initial=3")


def test_a_link_may_ask_for_more_ranks_than_it_has():
    tasks = BatchJobTasks(2, 8)
    assert (tasks.available(), tasks.maximum()) == (2, 8)
    job = tasks.place(digits("launch.launcher=slurm", "launch.slurm.step=srun"), 2)
    assert job.launch.launcher == "srun"


# Hosts that fail


class FailingHosts:
    """A pool with a clock and hosts that answer or not as the test decides."""

    def __init__(self, *overrides):
        self.now, self.down, self.changes = 0.0, set(), []
        self.job = digits("launch.cool_down=60.0", "ranks.max=5", *overrides)
        self.pool = HostPool(
            self.job,
            HOSTS,
            lambda host, action, why: self.changes.append((host, action)),
            answers=lambda host: host not in self.down,
            clock=lambda: self.now,
        )

    def place(self, ranks):
        return hosts(self.pool, ranks)


@pytest.fixture
def failing():
    return FailingHosts()


@pytest.mark.parametrize(
    ("ranks", "filled"),
    [(1, "a:1"), (2, "a:2"), (3, "a:2,b:1"), (5, "a:2,b:2,c:1"), (9, "a:2,b:2,c:1")],
)
def test_more_ranks_use_more_hosts_in_the_stated_order(failing, ranks, filled):
    assert ",".join(f"{n}:{s}" for n, s in fill(HOSTS, ranks)) == filled
    assert failing.place(ranks) == filled


def test_a_host_that_does_not_answer_is_set_aside_until_it_answers(failing):
    assert failing.place(4) == "a:2,b:2"
    failing.down.add("b")
    failing.pool.report_failure(None)
    assert failing.changes == [("b", "set_aside")]
    assert (failing.pool.available(), failing.pool.maximum()) == (3, 3)
    assert failing.place(3) == "a:2,c:1"
    failing.now = 59
    failing.down.clear()
    assert not failing.pool.retry_hosts(), "the cool-down is not over"
    failing.now = 60
    assert failing.pool.retry_hosts()
    assert failing.changes[-1] == ("b", "returned")
    assert failing.place(5) == "a:2,b:2,c:1"


def test_a_host_that_still_does_not_answer_cools_down_again(failing):
    failing.down.add("b")
    failing.pool.report_failure(None)
    failing.now = 60
    assert not failing.pool.retry_hosts()
    failing.down.clear()
    failing.now = 100
    assert not failing.pool.retry_hosts()
    failing.now = 120
    assert failing.pool.retry_hosts()


def test_hosts_are_asked_together(failing):
    failing.place(5)
    failing.down.update("abc")
    failing.pool.report_failure(None)
    failing.now = 60
    together = threading.Barrier(3)
    failing.pool._answers = lambda host: together.wait(10) >= 0
    assert failing.pool.retry_hosts()
    assert failing.changes[3:] == [(host, "returned") for host in "abc"]


def test_hosts_without_ranks_are_not_checked(failing):
    failing.place(2)
    failing.down.add("b")
    failing.pool.report_failure(None)
    assert failing.changes == []


def test_a_host_that_answers_is_set_aside_only_after_two_failures_in_a_row(failing):
    failing.place(5)
    failing.pool.report_failure("b")
    assert failing.changes == []
    failing.pool.report_success()
    failing.pool.report_failure("b")
    assert failing.changes == []
    failing.pool.report_failure("b")
    assert failing.changes == [("b", "set_aside")]


def test_a_host_that_fails_is_recognized_with_and_without_its_domain():
    """Launchers and ranks name hosts as these name themselves, and not as the job does."""
    changes = []
    pool = HostPool(
        digits("ranks.max=4"),
        [("a.site", 2), ("b", 2)],
        lambda host, action, _: changes.append((host, action)),
        answers=lambda host: True,
    )
    pool.place(digits(), 4)
    for host in ("a", "a", "b.site", "b.site"):
        pool.report_failure(host)
    assert changes == [("a.site", "set_aside"), ("b", "set_aside")]


def test_where_all_hosts_are_set_aside_all_are_tried(failing):
    failing.place(5)
    failing.down.update("abc")
    failing.pool.report_failure(None)
    assert len(failing.changes) == 3
    assert failing.place(5) == "a:2,b:2,c:1"


def test_after_the_loss_of_a_host_the_initial_ranks_share_the_slots_that_are_left(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(launchers, "program", lambda name: name)
    job = digits("ranks.initial=4", "ranks.max=4")
    pool = HostPool(job, [("a", 2), ("b", 2)], lambda *_: None, answers=lambda host: host == "a")
    pool.place(job, 4)
    pool.report_failure(None)
    supervisor = Supervisor(JobProgram(job), RunDir(tmp_path / "run"), resources=pool)
    words = supervisor.launch_command(fresh=True).words
    assert words[words.index("-np") + 1] == "4"
    assert words[words.index("-H") + 1] == "a:2"
    assert not any(word.startswith("ranks.max=") for word in words)  # ranks would refuse 2


def test_a_host_of_a_scheduler_without_ssh_is_not_taken_to_be_down():
    down, changes = {"b"}, []
    pool = HostPool(
        digits("ranks.max=4"),
        [("a", 2), ("b", 2)],
        lambda host, action, _: changes.append((host, action)),
        answers=lambda host: host not in down,
        by_scheduler=True,
    )
    pool.place(digits(), 4)
    pool.reach()
    pool.report_failure(None)
    assert changes == []
    down.clear()
    pool.reach()
    down.add("b")
    pool.report_failure(None)
    assert changes == [("b", "set_aside")]


def test_this_machine_is_not_asked():
    assert is_here("localhost")
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.1")
    assert not is_here("a..b")
    assert is_reachable("localhost", ("/no/such/agent",))
    assert not is_reachable("192.0.2.1", ("/no/such/agent",))
    assert not is_reachable("192.0.2.1", ("false",))
    assert is_reachable("192.0.2.1", ("true",))


def test_host_files_of_all_forms(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# all nodes\nb slots=4\n\na:2   # old\nb slots = 1 max_slots=8\nc\n")
    assert stated_hosts(digits(f"launch.hostfile={path}")) == [("b", 5), ("a", 2), ("c", 1)]
    path.write_text("a slots=0\n")
    with pytest.raises(UsageError, match="'a slots=0': expected a line like 'name slots=4'"):
        stated_hosts(digits(f"launch.hostfile={path}"))
    path.write_text("\n")
    with pytest.raises(UsageError, match="no host in it"):
        stated_hosts(digits(f"launch.hostfile={path}"))
    with pytest.raises(UsageError, match=r"launch\.hostfile = .*cannot be read"):
        stated_hosts(digits("launch.hostfile=/none"))
