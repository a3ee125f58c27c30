"""Which hosts a world gets, and what becomes of those that fail; no process is started."""

import pytest

from hpc_absa.errors import UsageError
from hpc_absa.supervisor.hosts import HostPool, fill, is_here, reached
from hpc_absa.worldsize import stated_hosts
from tests.supervisor.digits import digits

HOSTS = [("a", 2), ("b", 2), ("c", 1)]


class Story:
    """A pool with a clock and hosts that are dead or alive as the test says."""

    def __init__(self, *overrides):
        self.now, self.dead, self.told = 0.0, set(), []
        self.job = digits("launch.cool_down=60.0", "ranks.max=5", *overrides)
        self.pool = HostPool(
            self.job,
            HOSTS,
            lambda host, action, why: self.told.append((host, action)),
            answers=lambda host: host not in self.dead,
            clock=lambda: self.now,
        )

    def hosts(self, ranks):
        return self.pool.placed(self.job, ranks).launch.hosts


@pytest.mark.parametrize(
    ("ranks", "filled"),
    [(1, "a:1"), (2, "a:2"), (3, "a:2,b:1"), (5, "a:2,b:2,c:1"), (9, "a:2,b:2,c:1")],
)
def test_more_ranks_take_more_hosts_in_the_stated_order(ranks, filled):
    assert ",".join(f"{n}:{s}" for n, s in fill(HOSTS, ranks)) == filled
    assert Story().hosts(ranks) == filled


def test_a_silent_host_is_set_aside_and_taken_back_when_it_answers():
    story = Story()
    assert story.hosts(4) == "a:2,b:2"
    story.dead.add("b")
    story.pool.failed(None)
    assert story.told == [("b", "set_aside")]
    assert (story.pool.here(), story.pool.most()) == (3, 3)
    assert story.hosts(3) == "a:2,c:1"
    story.now = 59
    story.dead.clear()
    assert not story.pool.try_again(), "it was to cool down"
    story.now = 60
    assert story.pool.try_again()
    assert story.told[-1] == ("b", "returned")
    assert story.hosts(5) == "a:2,b:2,c:1"


def test_a_host_that_stays_silent_cools_down_again():
    story = Story()
    story.dead.add("b")
    story.pool.failed(None)
    story.now = 60
    assert not story.pool.try_again()
    story.dead.clear()
    story.now = 100
    assert not story.pool.try_again()
    story.now = 120
    assert story.pool.try_again()


def test_hosts_that_took_no_part_are_not_asked():
    story = Story()
    story.hosts(2)
    story.dead.add("b")
    story.pool.failed(None)
    assert story.told == []


def test_only_a_second_failure_in_a_row_sets_a_living_host_aside():
    story = Story()
    story.hosts(5)
    story.pool.failed("b")
    assert story.told == []
    story.pool.succeeded()
    story.pool.failed("b")
    assert story.told == []
    story.pool.failed("b")
    assert story.told == [("b", "set_aside")]


def test_where_all_are_set_aside_all_are_tried():
    story = Story()
    story.hosts(5)
    story.dead.update("abc")
    story.pool.failed(None)
    assert len(story.told) == 3
    assert story.hosts(5) == "a:2,b:2,c:1"


def test_this_machine_needs_no_proof():
    assert is_here("localhost")
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.1")
    assert reached("localhost", ("/no/such/agent",))
    assert not reached("192.0.2.1", ("/no/such/agent",))
    assert not reached("192.0.2.1", ("false",))
    assert reached("192.0.2.1", ("true",))


def test_a_hostfile_of_any_kind(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("# ours\nb slots=4\n\na:2   # old\nb slots = 1 max_slots=8\nc\n")
    assert stated_hosts(digits(f"launch.hostfile={path}")) == [("b", 5), ("a", 2), ("c", 1)]
    path.write_text("a slots=0\n")
    with pytest.raises(UsageError, match="'a slots=0': expected a line like 'name slots=4'"):
        stated_hosts(digits(f"launch.hostfile={path}"))
    path.write_text("\n")
    with pytest.raises(UsageError, match="no host in it"):
        stated_hosts(digits(f"launch.hostfile={path}"))
    with pytest.raises(UsageError, match=r"launch\.hostfile = .*cannot be read"):
        stated_hosts(digits("launch.hostfile=/none"))
