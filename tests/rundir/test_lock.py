"""One writer a run directory: refused, freed, waited for."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from hpc_absa.errors import ExitStatus, RunLockedError
from hpc_absa.rundir import RunDir
from hpc_absa.rundir import lock as locks
from hpc_absa.rundir.lock import RunLock, host

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from hpc_absa.rundir.lock import RunLock
from hpc_absa.rundir import RunDir
lock = RunLock(RunDir(Path(sys.argv[1])))
lock.acquire()
if len(sys.argv) > 2:
    # A world that outlives its supervisor by so many seconds.
    subprocess.Popen(["sleep", sys.argv[2]], pass_fds=(lock.descriptor,), stdout=sys.stderr)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(name="run")
def _run(tmp_path):
    return RunDir(tmp_path)


@pytest.fixture(name="start")
def _start(run):
    """Starts another process that holds the lock."""
    started = []

    def start(*words):
        command = [sys.executable, "-c", HOLDER, run.path, *words]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_with_the_first_one_s_name(run, start):
    other = start()
    lock = RunLock(run)
    with pytest.raises(RunLockedError) as caught:
        lock.acquire()
    assert str(caught.value) == (
        f"{run.path}: in use by process {other.pid} on {host()}; stop that one, "
        "or use another --run-dir"
    )
    assert caught.value.status == ExitStatus.FAILED
    assert lock.descriptor is None


def test_a_killed_holder_frees_it_at_once(run, start):
    other = start()
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock = RunLock(run)
    begun = time.monotonic()
    lock.acquire()
    assert time.monotonic() - begun < 1
    assert json.loads(run.lock.read_text())["pid"] == os.getpid()
    lock.release()


def test_the_world_of_a_killed_holder_is_waited_for(run, start):
    other = start("1.5")
    begun = time.monotonic()
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock = RunLock(run)
    lock.acquire()
    assert 0.5 < time.monotonic() - begun < 10
    lock.release()


def test_a_world_that_does_not_end_is_not_waited_for_for_ever(run, start, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.5)
    other = start("5")
    other.send_signal(signal.SIGKILL)
    other.wait()
    with pytest.raises(RunLockedError, match=f"in use by process {other.pid}"):
        RunLock(run).acquire()


def elsewhere(run, pid=1):
    run.lock.write_text(json.dumps({"host": "far-away", "pid": pid, "beat": time.time()}))


def test_a_holder_on_another_host_that_gives_signs_of_life_is_refused(run, start):
    start()
    elsewhere(run)
    beating = threading.Timer(0.5, elsewhere, (run, 2))
    beating.start()
    with pytest.raises(RunLockedError, match="process 2 on far-away"):
        RunLock(run).acquire()
    beating.join()


@pytest.mark.parametrize("has_locks", [True, False])
def test_the_lock_of_a_host_that_died_blocks_nobody(run, start, monkeypatch, has_locks):
    """Its lock may live on in a file server; where there are no locks the file alone tells."""
    monkeypatch.setattr(locks, "STALE", 0.5)
    if has_locks:
        start()
    else:
        monkeypatch.setattr(locks, "_try_lock", lambda _: None)
    elsewhere(run)
    lock = RunLock(run)
    lock.acquire()
    assert json.loads(run.lock.read_text())["pid"] == os.getpid()
    with pytest.raises(RunLockedError, match=f"process {os.getpid()} on"):
        RunLock(run).acquire()
    lock.release()


def test_without_locks_a_second_process_is_refused_all_the_same(run, start, monkeypatch):
    monkeypatch.setattr(locks, "_try_lock", lambda _: None)
    other = start()
    with pytest.raises(RunLockedError, match=f"process {other.pid} on {host()}"):
        RunLock(run).acquire()
    other.kill()
    other.wait()
    lock = RunLock(run)
    lock.acquire()
    lock.release()


def test_who_was_taken_to_be_dead_learns_of_it(run, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    lost, told = threading.Event(), []
    lock = RunLock(run, on_lost=lambda reason: (told.append(reason), lost.set()))
    lock.acquire()
    other = RunLock(run)
    os.close(other._take_over())
    elsewhere(run, 77)
    assert lost.wait(10)
    assert "taken over by process 77 on far-away" in told[0]
    lock.release()


def test_signs_of_life_are_given(run, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    lock = RunLock(run)
    lock.acquire()
    first = run.lock.read_text()
    deadline = time.monotonic() + 10
    while run.lock.read_text() == first:
        assert time.monotonic() < deadline
    lock.release()


def test_a_later_process_with_the_dead_one_s_number_is_not_it(run, monkeypatch):
    monkeypatch.setattr(locks, "_try_lock", lambda _: None)
    run.lock.write_text(json.dumps({"host": host(), "pid": os.getppid(), "started": 1.0}))
    lock = RunLock(run)
    lock.acquire()
    lock.release()


def test_released_it_can_be_taken_again(run):
    first, second = RunLock(run), RunLock(run)
    first.acquire()
    assert {"host", "pid", "started", "beat"} == json.loads(run.lock.read_text()).keys()
    with pytest.raises(RunLockedError):
        second.acquire()
    first.release()
    assert run.lock.read_text() == ""
    second.acquire()
    second.release()
    second.release()


@pytest.mark.parametrize("left", ["", "not json", "[1, 2]", "3", '{"pid": "x"}'])
def test_whatever_a_dead_holder_left_in_the_file_blocks_nobody(run, left):
    run.lock.write_text(left)
    lock = RunLock(run)
    lock.acquire()
    assert json.loads(run.lock.read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.parametrize("left", ["not json", "[1, 2]", "3", '{"pid": "x"}'])
def test_an_unreadable_holder_is_still_refused(run, start, left, monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    start()
    run.lock.write_text(left)
    with pytest.raises(RunLockedError, match="in use by process"):
        RunLock(run).acquire()


def test_it_is_not_inherited_unless_handed_over(run):
    lock = RunLock(run)
    lock.acquire()
    child = subprocess.Popen(["sleep", "5"], close_fds=False)
    lock.release()
    RunLock(run).acquire()
    child.kill()
    child.wait()
