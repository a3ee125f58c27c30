"""Rank-seconds add up to ranks times wall time, and a queue costs nothing."""

import pytest

from hpc_absa.report.accounting import account
from hpc_absa.report.rank_seconds import KINDS, cost
from hpc_absa.rundir.events import EventLog
from tests.report.synthetic import Log, whole_run


def told(log):
    return EventLog(log.path / "events.jsonl").read()


def test_a_whole_run_adds_up(tmp_path):
    log = whole_run(tmp_path)
    spent = cost(told(log))
    parts = account(told(log))
    worked = sum(p.wall * p.attempt.events[0]["ranks"] for p in parts)
    assert sum(phase.worked for phase in spent.phases) == pytest.approx(worked)
    assert [(p.phase, p.ranks) for p in spent.phases] == [(0, 1), (1, 2), (2, 4), (3, 4)]
    assert set(spent.phases[0].kinds) == set(KINDS)
    assert spent.phases[0].kinds["computing"] == pytest.approx(7.0)
    assert spent.phases[1].kinds["computing"] == pytest.approx(2 * (6.4 + 0.5))
    assert spent.phases[1].kinds["starting"] == pytest.approx(2 * 2.0)
    assert spent.phases[2].kinds["lost"] == pytest.approx(4 * 5.7)
    wall = sum(part.wall for part in parts)
    assert spent.largest == pytest.approx(4 * wall)
    # nothing of it says that the places were given back
    assert not spent.chained
    assert spent.charged == pytest.approx(spent.largest)
    assert spent.phases[0].idle == pytest.approx(3 * 9.5)


def chain(path, queued):
    """One rank for 4 s, `queued` seconds in the queue, two ranks for 4 s."""
    log = Log(path)
    log.event("link", link=1, job_id="1", action="submitted", nodes=1, ranks=1)
    log.tick(queued).event("link", link=1, job_id="1", action="started", ranks=1, restarts=0)
    log.tick(1.0).start().train_epoch(seconds=3.0).decide(1.0, grow_to=(64, 2))
    log.end("resize", 50, start=1.0, comp=3.0, hessian=0.5)
    log.event("link", link=2, job_id="2", action="submitted", nodes=2, ranks=2)
    log.event("link", link=1, job_id="1", action="ended", outcome="resize", step=50)
    log.tick(queued).event("link", link=2, job_id="2", action="started", ranks=2, restarts=0)
    log.tick(1.5).start().train_epoch(seconds=4.0)
    return log.end("done", 25, start=1.5, comp=3.5, comm=0.5).done()


@pytest.mark.parametrize("queued", [0.0, 10.0, 3600.0])
def test_a_queue_costs_nothing(tmp_path, queued):
    spent = cost(told(chain(tmp_path, queued)))
    one, two = spent.phases
    assert spent.chained
    assert (one.queued, two.queued) == pytest.approx((queued, 2 * queued))
    assert two.kinds["starting"] == pytest.approx(2 * 1.5)
    assert two.kinds["computing"] == pytest.approx(2 * 3.5)
    assert spent.charged == pytest.approx(one.worked + two.worked)
    assert spent.charged == pytest.approx(1 * 4.5 + 2 * 5.5)
    assert spent.largest == pytest.approx(2 * (4.5 + 5.5))


def test_nothing_has_happened(tmp_path):
    spent = cost([])
    assert (spent.charged, spent.largest, spent.phases) == (0, 0, ())
