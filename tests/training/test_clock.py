"""Where the seconds go: every one charged once."""

import time

import pytest

from hpc_absa.training.clock import KINDS, Clock


def test_every_second_is_charged_to_the_innermost_kind(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()
    now[0] += 1
    with clock("comp"):
        now[0] += 2
        with clock("comm"):
            now[0] += 4
        now[0] += 8
    now[0] += 16
    clock.add("start", 32)
    seconds = clock.seconds()
    assert seconds == dict.fromkeys(KINDS, 0.0) | {
        "other": 17,
        "comp": 10,
        "comm": 4,
        "start": 32,
    }
    clock.restart()
    assert sum(clock.seconds().values()) == 0


def test_an_exception_ends_its_kind(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()
    with pytest.raises(ValueError, match="x"), clock("eval"):
        raise ValueError("x")
    now[0] += 5
    assert clock.seconds()["other"] == 5


def test_work_queued_on_a_device_is_charged_to_the_kind_that_queued_it(monkeypatch):
    now, queued = [0.0], [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock()

    def synchronize():
        now[0] += queued[0]
        queued[0] = 0.0

    clock.synchronize = synchronize
    with clock("comp"):
        queued[0] = 3.0
    with clock("comm"):
        now[0] += 1
    assert (clock.seconds()["comp"], clock.seconds()["comm"]) == (3, 1)


def test_the_activity_changes_with_every_call():
    clock = Clock()
    seen = [clock.activity()]
    for _ in range(2):
        with clock("data"):
            seen.append(clock.activity())
    seen.append(clock.activity())
    assert [kind for kind, _ in seen] == ["other", "data", "data", "other"]
    assert len(set(seen)) == 4
