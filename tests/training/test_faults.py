"""Requests to stop, and hanging ranks, in one process with short intervals."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from hpc_absa.comm import SerialCommunicator
from hpc_absa.errors import CollectiveError, ExitStatus
from hpc_absa.training import faults
from hpc_absa.training.calls import Call, Calls
from hpc_absa.training.clock import Clock
from hpc_absa.training.faults import StopRequest, Watchdog


class Ranks(SerialCommunicator):
    """One of two ranks. The test chooses the sum over ranks and whether heartbeats arrive."""

    size = 2

    def __init__(self, rank=0, other=0.0, heartbeats=True, mark=0):
        self.rank, self.other, self.heartbeats, self.mark = rank, other, heartbeats, mark

    def allreduce_(self, tensor):
        return tensor.add_(self.other)

    def exchange_heartbeats(self, mark):
        return self.mark if self.heartbeats else None


@pytest.fixture(name="stop_request")
def _stop_request(tmp_path):
    """Makes stop requests, and restores the signal handlers."""
    handlers = {number: signal.getsignal(number) for number in faults.SIGNALS}
    made = []

    def make(comm):
        made.append(StopRequest(comm, tmp_path / "stop"))
        return made[-1]

    yield make
    for request in made:
        request.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(name="exits")
def _exits(monkeypatch):
    """Statuses with which the watching thread would have ended the process."""
    statuses = []

    def block(status):
        statuses.append(status)
        threading.Event().wait()

    monkeypatch.setattr(faults.os, "_exit", block)
    return statuses


@pytest.mark.parametrize("number", faults.SIGNALS)
def test_a_signal_requests_a_stop(stop_request, number):
    stop = stop_request(SerialCommunicator())
    assert not stop.requested_here()
    assert not stop.requested()
    os.kill(os.getpid(), number)
    assert stop.requested_here()
    assert stop.requested()


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_looks_for_the_file(stop_request, tmp_path, rank):
    stop = stop_request(Ranks(rank))
    (tmp_path / "stop").touch()
    assert stop.requested_here() == (rank == 0)


def test_a_request_on_any_rank_counts_for_all_ranks(stop_request):
    stop = stop_request(Ranks(other=1.0))
    assert not stop.requested_here()
    assert stop.requested()


def test_items_are_passed_through_unchanged(stop_request):
    assert list(stop_request(SerialCommunicator()).count_progress("abc")) == ["a", "b", "c"]


def test_a_rank_that_was_asked_to_stop_and_makes_no_progress_exits(
    stop_request, monkeypatch, exits, capsys
):
    monkeypatch.setattr(faults, "GRACE_SECONDS", 0.5)
    stop = stop_request(SerialCommunicator())
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(14):
        time.sleep(0.05)
        stop.requested_here()
    assert not exits, "it makes progress"
    with stop.saving():
        time.sleep(0.8)
    assert not exits, "it is saving"
    deadline = time.monotonic() + 20
    while not exits and time.monotonic() < deadline:
        time.sleep(0.05)
    assert exits == [ExitStatus.FAILED]
    assert "asked to stop, and blocked in a collective" in capsys.readouterr().out


def test_the_grace_period_is_three_of_the_longest_distances_between_progress(
    stop_request, monkeypatch, exits
):
    monkeypatch.setattr(faults, "GRACE_SECONDS", 0.1)
    stop = stop_request(SerialCommunicator())
    for item in stop.count_progress(range(2)):
        time.sleep(0.5 * (item == 0))
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.9)
    assert not exits


def test_a_process_goes_on_after_its_stop_request_is_closed(stop_request, monkeypatch, exits):
    monkeypatch.setattr(faults, "GRACE_SECONDS", 0.1)
    stop = stop_request(SerialCommunicator())
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested_here()
    stop.close()
    time.sleep(0.8)
    assert not exits


def test_a_closed_stop_request_leaves_no_thread(stop_request):
    before = threading.enumerate()
    stop = stop_request(SerialCommunicator())
    [thread] = [t for t in threading.enumerate() if t.name == "stop-watch" and t not in before]
    stop.close()
    thread.join(20)
    assert not thread.is_alive()


def wait_for_ever(ready):
    ready.set()
    threading.Event().wait()


def test_sigterm_ends_a_forked_process_and_does_not_stop_the_run(stop_request):
    """As `terminate` of a `multiprocessing.Pool` in a user's function does."""
    stop = stop_request(SerialCommunicator())
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    child = context.Process(target=wait_for_ever, args=(ready,), daemon=True)
    child.start()
    assert ready.wait(20)
    child.terminate()
    child.join(20)
    status = child.exitcode
    child.kill()
    assert status == -signal.SIGTERM
    time.sleep(0.3)
    assert not stop.requested_here()


def called(comm, *calls):
    """A rank's calls after these."""
    made = Calls(comm)
    for call in calls:
        made.enter(call)
    return made


def hang(
    monkeypatch,
    *,
    comm=None,
    clock=None,
    heartbeat_timeout=60.0,
    progress_timeout=60.0,
    calls=(),
    wait=0.5,
):
    """Reports of a watchdog within `wait` seconds, with a heartbeat each 20 ms."""
    monkeypatch.setattr(faults, "HEARTBEAT_INTERVAL", 0.02)
    reports, reported = [], threading.Event()

    def on_failure(*report):
        reports.append(report)
        reported.set()

    comm = comm or Ranks(rank=1)
    watchdog = Watchdog(
        comm,
        ["node-a", "node-b"],
        clock or Clock(),
        heartbeat_timeout,
        progress_timeout,
        on_failure,
        called(comm, *calls),
    )
    reported.wait(wait)
    watchdog.close()
    return reports


def test_a_rank_without_heartbeats_is_named_by_the_next_one(monkeypatch):
    comm = Ranks(rank=1, heartbeats=False)
    ((reason, *where),) = hang(monkeypatch, comm=comm, heartbeat_timeout=0.1, wait=20)
    assert reason.startswith("rank 0 on node-a has not answered for ")
    assert where == [0, "node-a", ExitStatus.FAILED]


@pytest.mark.parametrize(
    ("kind", "work"), [("data", "reading"), ("comp", "computing"), ("adversarial", "computing")]
)
def test_a_rank_that_takes_too_long_for_a_microbatch_names_itself(monkeypatch, kind, work):
    clock = Clock()
    with clock(kind):
        ((reason, rank, *_),) = hang(monkeypatch, clock=clock, progress_timeout=0.1, wait=20)
    assert reason.startswith(f"rank 1 on node-b has been {work} one microbatch for ")
    assert rank == 1


def test_a_rank_that_waits_for_others_is_not_hanging(monkeypatch):
    clock = Clock()
    with clock("comm"):
        assert not hang(monkeypatch, clock=clock, progress_timeout=0.1)


def test_ranks_that_were_suspended_together_are_not_hanging(monkeypatch):
    monkeypatch.setattr(faults, "SUSPENDED_SECONDS", 0.0)
    clock = Clock()
    with clock("comp"):
        reports = hang(
            monkeypatch,
            comm=Ranks(rank=1, heartbeats=False),
            clock=clock,
            heartbeat_timeout=0.1,
            progress_timeout=0.1,
        )
    assert not reports


STEP, LEFT = (Call.CONTINUE, Call.REDUCE), "left the loop or the with block"


@pytest.mark.parametrize(
    ("own", "other", "did"),
    [
        (STEP, (*STEP, Call.CONTINUE), None),
        (STEP, STEP, None),
        (STEP, (*STEP, Call.LEAVE), None),  # this rank may follow
        ((*STEP, Call.CONTINUE), (*STEP, Call.LEAVE), f"{LEFT}, and rank 1 continued its loop"),
        ((*STEP, *STEP), (*STEP, Call.LEAVE), f"{LEFT}, and rank 1 continued its loop"),
        (STEP, (Call.CONTINUE, Call.LEAVE), f"{LEFT}, and rank 1 took another step"),
        (STEP, (Call.CONTINUE, Call.SUM), "called run.sum, and rank 1 took another step"),
        ((*STEP, Call.LEAVE), (*STEP, *STEP), None),  # the other rank reports it
        ((), (Call.BEGIN, *STEP), None),
    ],
)
def test_a_rank_that_goes_on_names_one_that_does_not(monkeypatch, own, other, did):
    mark = called(None, *other).mark
    reports = hang(monkeypatch, comm=Ranks(rank=1, mark=mark), calls=own, wait=20 if did else 0.1)
    if did:
        ((reason, *where),) = reports
        assert reason.startswith(f"absa.Run: after step 0, rank 0 {did}: expected the same")
        assert where == [0, "node-a", ExitStatus.USAGE]
    else:
        assert not reports


@pytest.mark.parametrize(
    ("others", "line"),
    [
        ([Call.SUM, Call.SUM], None),
        ([Call.SUM, Call.LEAVE], "rank 2 left the loop or the with block, and rank 0 called run"),
        ([Call.LEAVE, Call.LEAVE], "rank 0 called run.sum, and rank 1 left the loop"),
    ],
)
def test_different_calls_that_wait_for_each_other_are_an_error_of_all_ranks(others, line):
    class Three(Ranks):
        def exchange_calls(self, value):
            return [value, *((call, 7) for call in others)]

    calls = Calls(Three())
    if line is None:
        assert calls.exchange(Call.SUM, 5) == [5, 7, 7]
    else:
        with pytest.raises(CollectiveError, match=line):
            calls.exchange(Call.SUM, 5)
