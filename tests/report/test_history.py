"""A run directory read into records: what counts, what was undone, what is missing."""

import math
from pathlib import Path

import pytest

from hpc_absa.errors import UsageError
from hpc_absa.report.history import Span, labels, load
from hpc_absa.rundir.events import EventLog
from tests.report.synthetic import EPOCH_SAMPLES, Log, whole_run


@pytest.fixture
def whole(tmp_path):
    whole_run(tmp_path / "run")
    return load(tmp_path / "run")


def test_what_a_crash_undid_does_not_count(whole):
    assert [e.epoch for e in whole.epochs] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert whole.epochs[5].test_accuracy == 0.945
    assert whole.steps == 2 * 50 + 2 * 25 + 2 * 12 + 2 * 6


def test_spans_of_epochs_with_their_values(whole):
    spans = {(s.begin, s.end): s.value for s in whole.spans["global_batch"]}
    assert spans[0, 1] == spans[1, 2] == 32
    assert spans[2, 3] == 64
    assert spans[5, 6] == 128
    assert spans[7, 8] == 256
    assert [s.value for s in whole.spans["ranks"]] == [1, 1, 2, 2, 4, 4, 4, 4]
    assert whole.spans["lr"][-1].value == pytest.approx(0.4)


def test_warm_up_has_one_span_per_epoch(tmp_path):
    log = Log(tmp_path).start(lr=0.1).train_epoch(lr=0.2).train_epoch(lr=0.3)
    log.end("done")
    assert load(tmp_path).spans["lr"] == (Span(0, 1, 0.2), Span(1, 2, 0.3))


def test_growth_within_an_epoch(tmp_path):
    log = Log(tmp_path).start()
    log.samples = EPOCH_SAMPLES // 2
    log.decide(9.0, grow_to=(64, 2)).end("resize").start()
    log.samples = EPOCH_SAMPLES
    log.event("epoch", epoch=1, step=10, samples=log.samples, lr=log.lr, global_batch=64, ranks=2)
    batch = load(tmp_path).spans["global_batch"]
    assert batch == (Span(0, 0.5, 32), Span(0.5, 1, 64))


def test_events_written_late_move_back_to_their_phase(tmp_path):
    """Growth in place: the decision is durable only after the next phase has begun."""
    whole_run(tmp_path / "a")
    lines = (tmp_path / "a" / "events.jsonl").read_text().splitlines(keepends=True)
    end = next(i for i, line in enumerate(lines) if '"in_place"' in line)
    late = [*lines[: end - 2], *lines[end : end + 2], *lines[end - 2 : end], *lines[end + 2 :]]
    assert '"phase_start"' in late[end - 1]
    assert '"decision"' in late[end + 1]
    Log(tmp_path / "b")
    (tmp_path / "b" / "events.jsonl").write_text("".join(late))
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    for name in ("epochs", "decisions", "spans", "phases", "seconds"):
        assert repr(getattr(a, name)) == repr(getattr(b, name)), name


def test_learning_rate_of_a_decision_is_ignored_during_warm_up(tmp_path):
    log = Log(tmp_path).start(lr=0.01).train_epoch(lr=0.02)
    log.decide(4.0, lr=0.4).train_epoch(lr=0.03)
    assert load(tmp_path).spans["lr"] == (Span(0, 1, 0.02), Span(1, 2, 0.03))


def test_null_is_nan_and_not_zero(whole):
    third = whole.decisions[2]
    assert math.isnan(third.eigenvalue)
    assert not third.converged
    assert third.reference == 19.0


def test_phases_sum_up_their_attempts(whole):
    assert [(p.number, p.attempts, p.outcome) for p in whole.phases] == [
        (0, 1, "resize"),
        (1, 1, "resize"),
        (2, 2, "in_place"),
        (3, 1, "done"),
    ]
    assert [(p.epoch_begin, p.epoch_end) for p in whole.phases] == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert sum(p.wall for p in whole.phases) == pytest.approx(whole.wall)
    assert whole.missing == ()


def test_failure_has_the_epoch_at_which_it_happened(whole):
    (failure,) = whole.interruptions
    assert (failure.epoch, failure.rank, failure.exit_code) == (6, 1, 137)


def test_attempt_without_an_end_is_an_interruption_once_another_follows(tmp_path):
    log = Log(tmp_path).start().train_epoch()
    assert load(tmp_path).interruptions == ()
    log.tick(100).start()
    (interruption,) = load(tmp_path).interruptions
    assert "the supervisor was killed too" in interruption.reason
    assert interruption.epoch == 1


def test_an_error_before_the_first_phase_is_among_the_failures(tmp_path):
    Log(tmp_path).event("error", reason="no such data set")
    history = load(tmp_path)
    assert [(f.reason, f.epoch) for f in history.interruptions] == [("no such data set", 0)]
    assert "still running" not in " ".join(history.missing)


def test_unfinished_line_is_reported_once_the_next_one_is_written(tmp_path):
    log = Log(tmp_path).start().train_epoch().cut_short()
    assert not any("events.jsonl" in sentence for sentence in load(tmp_path).missing)
    EventLog(log.path / "events.jsonl").append("failure", reason="killed")
    history = load(tmp_path)
    assert len(history.epochs) == 1
    assert any("1 line(s) of events.jsonl are invalid" in sentence for sentence in history.missing)


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda p: Log(p), "never started"),
        (lambda p: Log(p, job=None).start(), "job.toml is missing"),
        (lambda p: Log(p, job="name = ").start(), "job.toml cannot be read"),
        (lambda p: Log(p).start(), "No epoch has been finished"),
        (lambda p: Log(p).start().end("stopped"), "stopped on request"),
        (lambda p: Log(p).start().event("failure", reason="x"), "last event is a failure"),
        (lambda p: Log(p).start().end("resize"), "next phase has not started"),
        (lambda p: Log(p).event("failure", reason="x"), "No phase has started"),
        (lambda p: Log(p).event("error", reason="x"), "ended by an error"),
        (lambda p: Log(p).start().event("error", reason="x"), "ended by an error"),
        (lambda p: Log(p).start().end("done").event("done", steps=1).start(), "still running"),
    ],
)
def test_missing_parts_are_reported(tmp_path, write, sentence):
    write(tmp_path)
    assert sentence in " ".join(load(tmp_path).missing)


def test_fields_of_unexpected_types_are_ignored(tmp_path):
    log = Log(tmp_path).start(ranks="four", hosts="n1", lr=None, epoch=True)
    log.event("epoch", epoch=None, test_accuracy="high").event("phase_end", seconds=3)
    log.event("decision", reason=None, eigenvalue={}).event("unknown_kind")
    history = load(tmp_path)
    assert math.isnan(history.test_accuracy)
    assert history.phases[0].hosts == ()


@pytest.mark.parametrize("kind", ["absent", "file", "empty"])
def test_not_a_run_is_a_usage_error_of_one_line(tmp_path, kind):
    path = tmp_path / "x"
    if kind == "file":
        path.write_text("")
    elif kind == "empty":
        path.mkdir()
    with pytest.raises(UsageError, match=r"run directory") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_labels_are_unique(tmp_path):
    job = 'name = "{}"\n'
    for folder, name in (("a", "one"), ("b", "one"), ("c/a", "two")):
        Log(tmp_path / folder, job.format(name)).start()
    a, b, c = (load(tmp_path / folder) for folder in ("a", "b", "c/a"))
    assert labels([a, c]) == ["one", "two"]
    assert labels([a, b]) == ["a", "b"]
    assert labels([a, b, c]) == ["one (a)", "one (b)", "two (a)"]


def test_every_event_and_field_is_documented(tmp_path):
    """In `docs/run-directory.md`, as far as the logs of these tests have them."""
    document = (Path(__file__).parents[2] / "docs" / "run-directory.md").read_text()
    log = whole_run(tmp_path)
    for event in EventLog(log.path / "events.jsonl").read():
        assert f"**`{event['event']}`**" in document
        seconds = event.get("seconds")
        fields = {*event, *(seconds if isinstance(seconds, dict) else ())}
        assert [name for name in fields if f"`{name}`" not in document] == []
