"""One writer per run directory."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from hpc_absa.errors import ExitStatus, RunDirError, RunLockedError
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
    # A rank that runs this many seconds longer than its supervisor.
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

    def start(*arguments):
        command = [sys.executable, "-c", HOLDER, run.path, *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_second_process_is_refused_with_the_name_of_the_first(run, start):
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


def test_killed_holder_releases_the_lock_at_once(run, start):
    other = start()
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock = RunLock(run)
    begin = time.monotonic()
    lock.acquire()
    assert time.monotonic() - begin < 1
    assert json.loads(run.lock.read_text())["pid"] == os.getpid()
    lock.release()


def test_ranks_of_a_killed_supervisor_are_waited_for(run, start):
    other = start("1.5")
    begin = time.monotonic()
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock = RunLock(run)
    lock.acquire()
    assert 0.5 < time.monotonic() - begin < 10
    lock.release()


def test_waiting_for_ranks_that_do_not_exit_has_a_timeout(run, start, monkeypatch):
    monkeypatch.setattr(locks, "EXIT_TIMEOUT", 0.5)
    other = start("5")
    other.send_signal(signal.SIGKILL)
    other.wait()
    with pytest.raises(RunLockedError, match=f"in use by process {other.pid}"):
        RunLock(run).acquire()


def write_remote_holder(run, pid=1):
    run.lock.write_text(json.dumps({"host": "far-away", "pid": pid, "beat": time.time()}))


def test_holder_on_another_host_with_heartbeats_is_respected(run, start):
    start()
    write_remote_holder(run)
    heartbeat = threading.Timer(0.5, write_remote_holder, (run, 2))
    heartbeat.start()
    with pytest.raises(RunLockedError, match="process 2 on far-away"):
        RunLock(run).acquire()
    heartbeat.join()


@pytest.mark.parametrize("has_locks", [True, False])
def test_lock_of_a_crashed_host_is_taken_over(run, start, monkeypatch, has_locks):
    """A file server may keep its lock; without locks there is only the file."""
    monkeypatch.setattr(locks, "HEARTBEAT_TIMEOUT", 0.5)
    if has_locks:
        start()
    else:
        monkeypatch.setattr(locks, "_try_lock", lambda _: None)
    write_remote_holder(run)
    lock = RunLock(run)
    lock.acquire()
    assert json.loads(run.lock.read_text())["pid"] == os.getpid()
    with pytest.raises(RunLockedError, match=f"process {os.getpid()} on"):
        RunLock(run).acquire()
    lock.release()


def test_without_file_locks_a_second_process_is_refused(run, start, monkeypatch):
    monkeypatch.setattr(locks, "_try_lock", lambda _: None)
    other = start()
    with pytest.raises(RunLockedError, match=f"process {other.pid} on {host()}"):
        RunLock(run).acquire()
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # dead, and a zombie until waited for
    lock = RunLock(run)
    lock.acquire()
    lock.release()


def test_holder_that_lost_its_lock_is_notified(run, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_INTERVAL", 0.05)
    lost, reasons = threading.Event(), []
    lock = RunLock(run, on_lost=lambda reason: (reasons.append(reason), lost.set()))
    lock.acquire()
    other = RunLock(run)
    os.close(other._take_over())
    write_remote_holder(run, 77)
    assert lost.wait(10)
    assert "taken over by process 77 on far-away" in reasons[0]
    lock.release()


def test_heartbeats_are_written(run, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_INTERVAL", 0.05)
    lock = RunLock(run)
    lock.acquire()
    first = run.lock.read_text()
    deadline = time.monotonic() + 10
    while run.lock.read_text() == first:
        assert time.monotonic() < deadline
    lock.release()


def test_later_process_with_the_same_pid_is_not_the_holder(run, monkeypatch):
    monkeypatch.setattr(locks, "_try_lock", lambda _: None)
    run.lock.write_text(json.dumps({"host": host(), "pid": os.getppid(), "started": 1.0}))
    lock = RunLock(run)
    lock.acquire()
    lock.release()


def test_a_full_disk_is_one_line_with_the_name_of_the_lock(run, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lock = RunLock(run)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(RunDirError) as caught:
            lock.acquire()
    assert str(caught.value) == f"{run.lock}: cannot be written: No space left on device"
    lock = RunLock(run)
    lock.acquire()
    lock.release()


def test_a_holder_is_the_same_process_after_the_clock_was_set(run):
    """It then seems to be younger than its lock, but not than its last heartbeat."""
    holder = {"host": host(), "pid": os.getpid(), "started": 1.0, "beat": time.time()}
    run.lock.write_text(json.dumps(holder))
    assert locks.read_lock(run.lock).live
    run.lock.write_text(json.dumps({**holder, "beat": 2.0}))
    assert not locks.read_lock(run.lock).live


def test_released_lock_can_be_acquired_again(run):
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
def test_unreadable_file_of_a_dead_holder_is_ignored(run, left):
    run.lock.write_text(left)
    lock = RunLock(run)
    lock.acquire()
    assert json.loads(run.lock.read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.parametrize("left", ["not json", "[1, 2]", "3", '{"pid": "x"}'])
def test_held_lock_with_an_unreadable_file_is_respected(run, start, left, monkeypatch):
    monkeypatch.setattr(locks, "EXIT_TIMEOUT", 0.3)
    start()
    run.lock.write_text(left)
    with pytest.raises(RunLockedError, match="in use by process"):
        RunLock(run).acquire()


def test_the_lock_of_ranks_is_another_one_and_is_waited_for(run, start):
    run.create()
    start()
    first, second = (RunLock(run, path=run.ranks_lock) for _ in range(2))
    first.acquire()
    with pytest.raises(RunLockedError, match=re.escape(f"{run.path}: in use by process")):
        second.acquire()
    threading.Timer(0.5, first.release).start()
    second.acquire(wait=True)
    second.release()


def test_waiting_for_a_holder_that_lives_has_a_timeout(run, monkeypatch):
    run.create()
    monkeypatch.setattr(locks, "EXIT_TIMEOUT", 0.5)
    first = RunLock(run, path=run.ranks_lock)
    first.acquire()
    with pytest.raises(RunLockedError):
        RunLock(run, path=run.ranks_lock).acquire(wait=True)
    first.release()


def test_child_process_does_not_inherit_the_lock(run):
    lock = RunLock(run)
    lock.acquire()
    child = subprocess.Popen(["sleep", "5"], close_fds=False)
    lock.release()
    RunLock(run).acquire()
    child.kill()
    child.wait()
