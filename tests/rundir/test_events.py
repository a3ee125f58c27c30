"""The event log: whole lines only, from any number of writers, also after a crash."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpc_absa.errors import RunDirError
from hpc_absa.rundir import events
from hpc_absa.rundir.events import EventLog, effective
from tests.checkpoint.contents import mounted


@pytest.fixture(name="log")
def _log(tmp_path):
    return tmp_path / "events.jsonl"


def test_append_and_read(log):
    before = time.time()
    written = [
        EventLog(log).append("phase_start", 1, ranks=2, hosts=["a", "b"]),
        EventLog(log).append("decision", 1, reason="λ 3.1 ≤ 7.4/2\nnext", seconds={"comp": 1.5}),
    ]
    assert EventLog(log).read() == written
    assert written[0]["event"] == "phase_start"
    assert written[0]["phase"] == 1
    assert before <= written[0]["time"] <= time.time()
    assert len(log.read_text().splitlines()) == 2


def test_a_field_may_give_the_time(log):
    assert EventLog(log).append("epoch", 1, time=12.5)["time"] == 12.5


def test_no_log_has_no_events(log):
    assert EventLog(log).read() == []


def test_what_json_has_not_becomes_null(log):
    nan, inf = float("nan"), float("inf")
    EventLog(log).append("decision", 1, eigenvalue=nan, all=[inf, 1.0], parts={"x": (-inf, 2)})

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(log.read_text(), parse_constant=refuse)
    assert found["eigenvalue"] is None
    assert found["all"] == [None, 1.0]
    assert found["parts"] == {"x": [None, 2]}


@given(st.integers(0, 10**6))
def test_a_line_cut_anywhere_is_passed_over_and_closed(tmp_path_factory, cut):
    log = tmp_path_factory.mktemp("run") / "events.jsonl"
    first = EventLog(log).append("epoch", 1, note="λ ≤ κ")
    whole = log.read_bytes()
    second = EventLog(log).append("epoch", 2, note="α → β")
    length = len(whole) + cut % (log.stat().st_size - len(whole))
    os.truncate(log, length)
    reader = EventLog(log)
    assert reader.read() == [first]
    third = EventLog(log).append("epoch", 3)
    # Only the newline may be missing from a line that is otherwise complete.
    left = [first, second] if length == len(whole) + len(line_of(second)) else [first]
    assert reader.read() == [*left, third]


def line_of(record):
    return json.dumps(record, ensure_ascii=False).encode()


def test_lines_that_are_no_events_are_passed_over(log):
    log.write_bytes(
        b'\n[1]\n"event"\n{"time": 1}\n{"event": "epoch", "phase": 1}\n{"event": "epoch"}\n'
        b'{"event": "epoch", "phase": null}\n\xff\xfe\n{"event": "done", "phase": 2}\n'
    )
    reader = EventLog(log)
    assert [event["event"] for event in reader.read()] == ["epoch", "done"]
    assert reader.invalid_lines == 6


APPENDING = """
import sys
from pathlib import Path
from hpc_absa.rundir import events
from hpc_absa.rundir.events import EventLog, effective
from hpc_absa.errors import RunDirError
for number in range(300):
    fields = {"writer": sys.argv[2], "number": number, "text": sys.argv[2] * (number * 40)}
    EventLog(Path(sys.argv[1])).append("epoch", 1, **fields)
"""


def test_lines_of_several_processes_never_mix(log):
    writers = [subprocess.Popen([sys.executable, "-c", APPENDING, log, name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    found = EventLog(log).read()
    assert len(found) == 900
    for name in "abc":
        mine = [event for event in found if event["writer"] == name]
        assert [event["number"] for event in mine] == list(range(300))
        assert all(event["text"] == name * (event["number"] * 40) for event in mine)


def test_an_event_that_a_full_disk_cut_is_reported(tmp_path):
    with mounted(tmp_path / "small", "size=16k") as folder:
        log, written = folder / "events.jsonl", []

        def fill():
            for _ in range(9):
                written.append(EventLog(log).append("epoch", 1, text="x" * 3000))

        with pytest.raises(RunDirError, match="No space left"):
            fill()
        assert written
        assert EventLog(log).read() == written


def test_reading_continues_where_it_ended(log, monkeypatch):
    reader = EventLog(log)
    assert reader.read() == []
    assert reader.last() is None
    first = EventLog(log).append("epoch", 3, note="λ")
    assert reader.read() == [first]
    parsed = []
    monkeypatch.setattr(events, "_parse", lambda line: parsed.append(line) or json.loads(line))
    second = EventLog(log).append("epoch", None)
    assert second["phase"] == 3
    parsed.clear()
    assert reader.read() == [first, second]
    assert len(parsed) == 1
    assert reader.last("epoch") == second
    assert reader.last("done") is None


def test_a_new_file_under_the_name_is_read_from_its_beginning(log):
    reader = EventLog(log)
    reader.append("epoch", 1)
    assert len(reader.read()) == 1
    log.unlink()
    new = [EventLog(log).append("epoch", 1, number=n) for n in range(5)]
    assert reader.read() == new


def test_a_removed_file_has_no_events(log):
    reader = EventLog(log)
    reader.append("done", 1)
    assert reader.last("done")
    log.unlink()
    assert reader.read() == []
    new = EventLog(log).append("epoch", 1)
    assert reader.read() == [new]


def test_a_field_with_a_new_name_is_read_under_its_former_one(log):
    EventLog(log).append("decision", 1, settled=True)
    assert EventLog(log).read()[0]["stopped_above_threshold"] is True


# What counts


def event(kind, step=None, **fields):
    return {"event": kind, **fields} | ({} if step is None else {"step": step})


def test_what_a_crash_undid_does_not_count():
    log = [
        event("phase_start", 0),
        event("epoch", 10, accuracy=0.5),
        event("checkpoint", 10),
        event("epoch", 20, accuracy=0.6),
        event("failure"),
        event("phase_start", 10),
        event("epoch", 20, accuracy=0.7),
    ]
    assert effective(log) == [*log[:3], *log[4:]]


def test_each_of_several_restarts_undoes_what_lay_behind_it():
    log = [
        event("phase_start", 0),
        event("epoch", 10),
        event("epoch", 20),
        event("phase_start", 10),
        event("epoch", 20),
        event("epoch", 30),
        event("phase_start", 0),
        event("epoch", 10),
    ]
    assert effective(log) == [log[0], *log[6:]]


def test_a_restart_where_nothing_was_lost_undoes_nothing():
    log = [event("phase_start", 0), event("epoch", 10), event("phase_end", 10)]
    log += [event("resize"), event("phase_start", 10), event("done")]
    assert effective(log) == log
    assert effective([]) == []


def test_a_full_disk_is_named():
    with pytest.raises(RunDirError, match="/dev/full: cannot be written: No space left on device"):
        EventLog(Path("/dev/full")).append("epoch", 1)
