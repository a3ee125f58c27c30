"""Every second has a name, whatever happened to the run."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpc_absa.report.accounting import CATEGORIES, account, attempts, total
from hpc_absa.rundir.events import EventLog
from tests.report.synthetic import START, Log, whole_run


def accounted(log):
    parts = account(EventLog(log.path / "events.jsonl").read())
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


def test_orderly_phase_needs_no_other(tmp_path):
    log = Log(tmp_path).start().tick(10)
    log.end("done", comp=7.0, comm=1.0, start=2.0).done()
    assert accounted(log)[1] == pytest.approx({"comp": 7.0, "comm": 1.0, "start": 2.0})


def test_what_a_phase_did_not_tell_is_other(tmp_path):
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


def test_start_of_a_resized_world_counts_once(tmp_path):
    log = Log(tmp_path).start().tick(5).end("resize", comp=5.0)
    log.tick(3).start().tick(1).event("resize", from_ranks=1, to_ranks=2, seconds=4.0)
    log.tick(6).end("done", comp=6.0, start=4.0)
    parts, seconds = accounted(log)
    assert wall(parts) == pytest.approx(15)
    assert seconds == pytest.approx({"comp": 11.0, "resize": 4.0})


def test_running_world_after_a_resize_counts_what_its_event_says(tmp_path):
    log = Log(tmp_path).start().tick(5).end("resize", comp=5.0)
    log.tick(3).start().tick(1).event("resize", from_ranks=1, to_ranks=2, seconds=4.0).tick(6)
    log.event("epoch", epoch=1, step=0)
    assert accounted(log)[1] == pytest.approx({"comp": 5.0, "resize": 4.0, "unmeasured": 6.0})


def test_first_step_of_a_new_world_is_computing_though_resize_ends_after_it(tmp_path):
    log = Log(tmp_path).start().tick(5).end("resize", comp=5.0)
    log.tick(3).start().tick(2).event("resize", from_ranks=1, to_ranks=2, seconds=5.0)
    log.tick(6).end("done", comp=8.0, start=3.0)
    assert accounted(log)[1] == pytest.approx({"comp": 13.0, "resize": 3.0})


def test_resize_without_its_event_is_the_gap_and_the_start(tmp_path):
    log = Log(tmp_path).start().tick(5).end("resize", comp=5.0)
    log.tick(3).start().tick(7).end("done", comp=6.0, start=4.0)
    assert accounted(log)[1] == pytest.approx({"comp": 11.0, "resize": 4.0})


def test_pause_after_a_stop_is_no_part_of_the_run(tmp_path):
    log = Log(tmp_path).start().tick(5).end("stopped", comp=5.0)
    log.tick(86_400).start().tick(5).end("done", comp=5.0, start=2.0)
    parts, seconds = accounted(log)
    assert wall(parts) == pytest.approx(12)
    assert sum(part.paused for part in parts) == pytest.approx(86_398)
    assert seconds == pytest.approx({"comp": 10.0, "start": 2.0})


def test_silent_end_is_a_pause_and_loses_what_was_not_saved(tmp_path):
    log = Log(tmp_path).start().train_epoch(seconds=6).save(0.0)
    saved = log.step, log.samples
    log.train_epoch(seconds=4).rewind(*saved).tick(1000)
    log.start().tick(3).end("done", comp=3.0)
    parts, seconds = accounted(log)
    assert seconds == pytest.approx({"unmeasured": 6.0, "lost": 4.0, "comp": 3.0})
    assert parts[1].paused == pytest.approx(1000)


def test_damaged_checkpoint_loses_part_of_an_orderly_phase(tmp_path):
    log = Log(tmp_path).start().train_epoch(seconds=6).save(0.0)
    saved = log.step, log.samples
    log.train_epoch(seconds=4).end("stopped", comp=10.0)
    log.rewind(*saved).start().tick(3).end("done", comp=3.0)
    assert accounted(log)[1] == pytest.approx({"comp": 6.0 + 3.0, "lost": 4.0})


def test_failures_before_the_first_phase_are_lost(tmp_path):
    log = Log(tmp_path).event("failure", reason="no route to host", rank=None)
    log.tick(4).start().tick(6).end("done", comp=6.0)
    assert accounted(log)[1] == pytest.approx({"comp": 6.0, "lost": 4.0})


def test_failure_with_nothing_after_it_loses_back_to_the_checkpoint(tmp_path):
    log = Log(tmp_path).start().train_epoch(seconds=6).save(0.0)
    log.train_epoch(seconds=4).tick(1).event("failure", reason="out of memory", rank=0)
    assert accounted(log)[1] == pytest.approx({"unmeasured": 6.0, "lost": 5.0})


def test_running_phase_is_not_broken_down_but_its_hessian_is(tmp_path):
    log = Log(tmp_path).start().train_epoch(seconds=6).decide(4.0)
    assert accounted(log)[1] == pytest.approx({"unmeasured": 6.0, "hessian": 0.5})


def test_attempts_know_how_they_ended(tmp_path):
    whole_run(tmp_path)
    parts = attempts(EventLog(tmp_path / "events.jsonl").read())
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
    st.sampled_from(["resize", "stopped", "in_place", "done", "failure", "silence"]),
    st.integers(0, 100),  # the step it resumes from
    st.one_of(st.none(), seconds),  # what a resize event says
)


@settings(max_examples=150)
@given(st.lists(stretch, min_size=1, max_size=6))
def test_seconds_always_add_up(stretches):
    """Whatever the events claim, however they contradict each other."""
    now, log = 1000.0, []
    for gap, length, told, ending, step, resized in stretches:
        now += gap
        log.append({"event": "phase_start", "time": now, "phase": 0, "step": step})
        if resized is not None:
            log.append({"event": "resize", "time": now, "phase": 0, "seconds": resized})
        log.append({"event": "checkpoint", "time": now + length / 2, "phase": 0, "step": step + 5})
        now += length
        end = {"time": now, "phase": 0, "step": step + 10}
        if ending == "failure":
            log.append({"event": "failure", **end})
        elif ending != "silence":
            log.append({"event": "phase_end", "seconds": told, "outcome": ending, **end})
    parts = account(log)
    for part in parts:
        assert math.isclose(sum(part.seconds.values()), part.wall, abs_tol=1e-6)
        assert all(value >= 0 for value in part.seconds.values())
        assert part.paused >= 0
    early = wall(parts) + sum(p.paused for p in parts) - (now - log[0]["time"])
    # Only the first world's start lies before the log.
    start = stretches[0][2].get("start", 0.0)
    if stretches[0][3] == "silence":
        early += stretches[0][1] / 2 if len(stretches) == 1 else 0.0
    assert -1e-6 - (stretches[-1][1] / 2) <= early <= start + 1e-6
