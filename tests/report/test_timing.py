"""Every second has a category, whatever happened; rank-seconds add up to ranks times wall time."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_absa.report.timing import CATEGORIES, KINDS, account, attempts, cost, total
from hpc_absa.rundir.events import EventLog
from tests.report.synthetic import START, Log, whole_run


def events(log):
    return EventLog(log.path / "events.jsonl").read()


def cost_of(log):
    """The cost of the events in a run directory."""
    written = events(log)
    return cost(written, account(written))


def accounted(log):
    parts = account(events(log))
    return parts, total(part.seconds for part in parts)


def wall(parts):
    return sum(part.wall for part in parts)


def test_whole_run_second_by_second(tmp_path):
    log = whole_run(tmp_path)
    parts, seconds = accounted(log)
    # The log spans all but the 0.5 s that the first rank took before it wrote `phase_start`.
    assert wall(parts) == pytest.approx(log.now - START + 0.5)
    assert seconds == pytest.approx(
        {
            "comp": 7.0 + 6.4 + 7.5 + 8.0,
            "comm": 0.6 + 0.8 + 0.7,
            "adversarial": 0.5,
            "hessian": 1.0 + 1.0 + 0.5 + 0.5,
            "data": 0.1 + 0.2,
            "eval": 0.4 + 0.3 + 0.3,
            "checkpoint": 0.2,
            "start": 1.0,
            "resize": 2.0 + 2.0,
            "lost": 3.0 + 2.7,
            "other": 0.3,
            "unmeasured": 4.6 - 0.5,
        },
        abs=1e-5,
    )


def test_complete_breakdown_leaves_no_other(tmp_path):
    log = Log(tmp_path).start().tick(10)
    log.end("done", comp=7.0, comm=1.0, start=2.0).done()
    assert accounted(log)[1] == pytest.approx({"comp": 7.0, "comm": 1.0, "start": 2.0})


def test_missing_part_of_a_breakdown_is_other(tmp_path):
    log = Log(tmp_path).start().tick(10).end("done", comp=7.0)
    assert accounted(log)[1] == pytest.approx({"comp": 7.0, "other": 3.0})


def test_start_before_phase_start_lengthens_the_run(tmp_path):
    log = Log(tmp_path).start().tick(10).end("done", comp=10.0, start=4.0)
    parts, seconds = accounted(log)
    assert wall(parts) == pytest.approx(14)
    assert seconds == pytest.approx({"comp": 10.0, "start": 4.0})


def test_breakdown_longer_than_the_phase_is_scaled(tmp_path):
    log = Log(tmp_path).start().tick(10).end("done", comp=15.0, comm=5.0)
    assert accounted(log)[1] == pytest.approx({"comp": 7.5, "comm": 2.5})


def test_start_of_resized_ranks_counts_once(tmp_path):
    log = Log(tmp_path).start().tick(5).end("resize", comp=5.0)
    log.tick(3).start().tick(1).event("resize", from_ranks=1, to_ranks=2, seconds=4.0)
    log.tick(6).end("done", comp=6.0, start=4.0)
    parts, seconds = accounted(log)
    assert wall(parts) == pytest.approx(15)
    assert seconds == pytest.approx({"comp": 11.0, "resize": 4.0})


def test_running_phase_after_a_resize_uses_the_resize_event(tmp_path):
    log = Log(tmp_path).start().tick(5).end("resize", comp=5.0)
    log.tick(3).start().tick(1).event("resize", from_ranks=1, to_ranks=2, seconds=4.0).tick(6)
    log.event("epoch", epoch=1, step=0)
    assert accounted(log)[1] == pytest.approx({"comp": 5.0, "resize": 4.0, "unmeasured": 6.0})


def test_first_step_after_a_resize_is_computing_though_the_resize_ends_after_it(tmp_path):
    log = Log(tmp_path).start().tick(5).end("resize", comp=5.0)
    log.tick(3).start().tick(2).event("resize", from_ranks=1, to_ranks=2, seconds=5.0)
    log.tick(6).end("done", comp=8.0, start=3.0)
    assert accounted(log)[1] == pytest.approx({"comp": 13.0, "resize": 3.0})


def test_resize_without_its_event_is_the_gap_and_the_start(tmp_path):
    log = Log(tmp_path).start().tick(5).end("resize", comp=5.0)
    log.tick(3).start().tick(7).end("done", comp=6.0, start=4.0)
    assert accounted(log)[1] == pytest.approx({"comp": 11.0, "resize": 4.0})


def test_pause_after_a_stop_is_not_part_of_the_run(tmp_path):
    log = Log(tmp_path).start().tick(5).end("stopped", comp=5.0)
    log.tick(86_400).start().tick(5).end("done", comp=5.0, start=2.0)
    parts, seconds = accounted(log)
    assert wall(parts) == pytest.approx(12)
    assert sum(part.paused for part in parts) == pytest.approx(86_398)
    assert seconds == pytest.approx({"comp": 10.0, "start": 2.0})


def test_kill_without_a_failure_is_a_pause_and_loses_unsaved_work(tmp_path):
    log = Log(tmp_path).start().train_epoch(seconds=6).save(0.0)
    saved = log.step, log.samples
    log.train_epoch(seconds=4).rewind(*saved).tick(1000)
    log.start().tick(3).end("done", comp=3.0)
    parts, seconds = accounted(log)
    assert seconds == pytest.approx({"unmeasured": 6.0, "lost": 4.0, "comp": 3.0})
    assert parts[1].paused == pytest.approx(1000)


def test_damaged_checkpoint_loses_part_of_a_phase_that_ended(tmp_path):
    log = Log(tmp_path).start().train_epoch(seconds=6).save(0.0)
    saved = log.step, log.samples
    log.train_epoch(seconds=4).end("stopped", comp=10.0)
    log.rewind(*saved).start().tick(3).end("done", comp=3.0)
    assert accounted(log)[1] == pytest.approx({"comp": 6.0 + 3.0, "lost": 4.0})


def test_failures_before_the_first_phase_are_lost(tmp_path):
    log = Log(tmp_path).event("failure", reason="no route to host", rank=None)
    log.tick(4).start().tick(6).end("done", comp=6.0)
    assert accounted(log)[1] == pytest.approx({"comp": 6.0, "lost": 4.0})


def test_last_failure_loses_the_work_since_the_checkpoint(tmp_path):
    log = Log(tmp_path).start().train_epoch(seconds=6).save(0.0)
    log.train_epoch(seconds=4).tick(1).event("failure", reason="out of memory", rank=0)
    assert accounted(log)[1] == pytest.approx({"unmeasured": 6.0, "lost": 5.0})


def test_running_phase_is_not_broken_down_but_its_hessian_is(tmp_path):
    log = Log(tmp_path).start().train_epoch(seconds=6).decide(4.0)
    assert accounted(log)[1] == pytest.approx({"unmeasured": 6.0, "hessian": 0.5})


def test_endings_of_attempts(tmp_path):
    log = whole_run(tmp_path)
    parts = attempts(events(log))
    assert [(p.phase, p.ending) for p in parts] == [
        (0, "ended"),
        (1, "ended"),
        (2, "failed"),
        (2, "ended"),
        (3, "ended"),
    ]


seconds = st.floats(0, 50)
stretch = st.tuples(
    seconds,  # gap before it
    seconds,  # its length
    st.dictionaries(st.sampled_from([*CATEGORIES, "made_up"]), seconds, max_size=6),
    st.sampled_from(["resize", "stopped", "in_place", "done", "failure", "killed"]),
    st.integers(0, 100),  # the step it resumes from
    st.one_of(st.none(), seconds),  # the seconds of a resize event
)


@settings(max_examples=150)
@given(st.lists(stretch, min_size=1, max_size=6))
def test_seconds_always_add_up(stretches):
    """However the events contradict each other."""
    now, log = 1000.0, []
    for gap, length, breakdown, ending, step, resized in stretches:
        now += gap
        log.append({"event": "phase_start", "time": now, "phase": 0, "step": step})
        if resized is not None:
            log.append({"event": "resize", "time": now, "phase": 0, "seconds": resized})
        log.append({"event": "checkpoint", "time": now + length / 2, "phase": 0, "step": step + 5})
        now += length
        end = {"time": now, "phase": 0, "step": step + 10}
        if ending == "failure":
            log.append({"event": "failure", **end})
        elif ending != "killed":
            log.append({"event": "phase_end", "seconds": breakdown, "outcome": ending, **end})
    parts = account(log)
    for part in parts:
        assert math.isclose(sum(part.seconds.values()), part.wall, abs_tol=1e-6)
        assert all(value >= 0 for value in part.seconds.values())
        assert part.paused >= 0
    early = wall(parts) + sum(p.paused for p in parts) - (now - log[0]["time"])
    # Only the first start of processes lies before the log.
    start = stretches[0][2].get("start", 0.0)
    if stretches[0][3] == "killed":
        early += stretches[0][1] / 2 if len(stretches) == 1 else 0.0
    assert -1e-6 - (stretches[-1][1] / 2) <= early <= start + 1e-6


def test_rank_seconds_of_a_whole_run_add_up(tmp_path):
    log = whole_run(tmp_path)
    spent = cost_of(log)
    parts = account(events(log))
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
    # no event shows that slots were released
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
def test_waiting_in_a_queue_costs_nothing(tmp_path, queued):
    spent = cost_of(chain(tmp_path, queued))
    one, two = spent.phases
    assert spent.chained
    assert (one.queued, two.queued) == pytest.approx((queued, 2 * queued))
    assert two.kinds["starting"] == pytest.approx(2 * 1.5)
    assert two.kinds["computing"] == pytest.approx(2 * 3.5)
    assert spent.charged == pytest.approx(one.worked + two.worked)
    assert spent.charged == pytest.approx(1 * 4.5 + 2 * 5.5)
    assert spent.largest == pytest.approx(2 * (4.5 + 5.5))


def test_no_events_cost_nothing():
    spent = cost([], [])
    assert (spent.charged, spent.largest, spent.phases) == (0, 0, ())
