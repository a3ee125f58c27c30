"""Ranks forked from the fork server, which here has imported nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hpc_absa.config import Launch
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import host
from hpc_absa.supervisor import fork_server, forked_rank
from hpc_absa.supervisor.fork_server import ForkServer, represented
from hpc_absa.supervisor.launchers import Command
from hpc_absa.supervisor.process import Failure
from hpc_absa.supervisor.resources import only_here

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests/supervisor/surroundings.py"


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(fork_server, "PRELOADED", ())
    server = ForkServer(RunDir(tmp_path))
    yield server
    server.close()


def start(words, **options) -> subprocess.Popen:
    return subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def forked(server: ForkServer, *words: str, **options) -> subprocess.Popen:
    return start(through(server, (sys.executable, str(SCRIPT), *words)), **options)


def through(server: ForkServer, words: tuple[str, ...]) -> tuple[str, ...]:
    command = Command(words)
    address = server.address(command)
    assert address
    return represented(command, server._run, address).words


def gone(pid: int) -> bool:
    end = time.monotonic() + 5
    while psutil.pid_exists(pid) and time.monotonic() < end:
        time.sleep(0.01)
    return not psutil.pid_exists(pid)


def pid_of(process: subprocess.Popen) -> int:
    """Of the rank, which writes it when it has started."""
    process.stdout.readline()
    return int(process.stderr.readline())


@pytest.mark.parametrize("module", [False, True])
def test_a_forked_rank_has_the_surroundings_of_one_that_is_executed(server, tmp_path, module):
    words = ["-m", "tests.supervisor.surroundings"] if module else [str(SCRIPT)]
    words = [sys.executable, *words, "exit", "0", "two words"]
    options = {
        "cwd": ROOT if module else tmp_path,
        "umask": 0o027,
        "env": {"PATH": os.environ["PATH"], "TEST_A": "caf\udce9 =", "OMPI_COMM_WORLD_RANK": "3"},
        "preexec_fn": lambda: os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}),
    }
    executed = start(words, **options)
    stub = start(through(server, tuple(words)), **options)
    wanted, shown = (json.loads(each.communicate(timeout=20)[0]) for each in (executed, stub))
    assert shown == wanted
    assert wanted["environment"]["TEST_A"] == "caf\udce9 ="
    assert (executed.returncode, stub.returncode) == (0, 0)


@pytest.mark.parametrize(
    ("words", "status"),
    [(["exit", "3"], 3), (["raise"], 1), (["signal", "9"], -9), (["signal", "11"], -11)],
)
def test_the_launcher_sees_the_end_of_the_rank(server, words, status):
    process = forked(server, *words)
    output, errors = process.communicate(timeout=20)
    assert process.returncode == status
    assert output.count("\n") == 1
    assert int(errors.splitlines()[0]) != process.pid
    if words == ["raise"]:
        lines = errors.splitlines()[1:]
        assert lines[0] == "Traceback (most recent call last):"
        assert lines[1].startswith(f'  File "{SCRIPT}", line')
        assert lines[-1] == "ArithmeticError: on purpose"


def test_signals_reach_the_rank(server):
    process = forked(server, "handle")
    pid_of(process)
    assert process.stderr.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 7


def test_a_rank_ends_with_its_process_under_the_launcher(server):
    process = forked(server, "wait")
    rank = pid_of(process)
    process.kill()
    assert gone(rank)


def test_a_killed_server_ends_its_ranks_and_the_next_launch_has_another_one(server):
    process = forked(server, "wait")
    rank = pid_of(process)
    first = server._process.pid
    server._process.kill()
    assert process.wait(10) == -signal.SIGKILL
    assert gone(rank)
    assert forked(server, "exit", "0").wait(20) == 0
    assert server._process.pid != first


@pytest.mark.parametrize(("words", "status"), [(["exit", "4"], 4), (["signal", "9"], -9)])
def test_where_no_server_answers_the_rank_is_executed(server, words, status):
    command = through(server, (sys.executable, str(SCRIPT), *words))
    server.close()
    process = start(command)
    rank = pid_of(process)
    assert process.wait(20) == status
    assert gone(rank)


@pytest.mark.parametrize("fork", [True, False])
def test_a_rank_that_is_killed_is_recorded_by_the_process_that_stands_for_it(server, fork):
    command = Command((sys.executable, str(SCRIPT), "wait"))
    words = represented(command, server._run, server.address(command) if fork else "").words
    server._run.logs.mkdir()
    one, other = (start(words, env=os.environ | {"OMPI_COMM_WORLD_RANK": n}) for n in "57")
    os.kill(pid_of(other), signal.SIGKILL)
    assert other.wait(10) == -signal.SIGKILL
    os.kill(pid_of(one), signal.SIGSEGV)
    assert one.wait(10) == -signal.SIGSEGV
    recorded = Failure(**json.loads(server._run.failure.read_text()))
    assert recorded == Failure("killed by SIGKILL", 7, host(), 137)


@pytest.mark.parametrize("fork", [True, False])
def test_a_rank_that_stays_stopped_is_recorded_and_killed(server, fork):
    command = Command((sys.executable, str(SCRIPT), "wait"))
    words = represented(command, server._run, server.address(command) if fork else "").words
    server._run.logs.mkdir()
    names = ("stopped", "continued", "by a terminal", "suspended")
    stubs = {n: start(words, env=os.environ | {"OMPI_COMM_WORLD_RANK": str(i)})
             for i, n in enumerate(names)}  # fmt: skip
    ranks = {name: pid_of(stub) for name, stub in stubs.items()}
    begin = time.monotonic()
    os.kill(ranks["by a terminal"], signal.SIGTSTP)  # as Slurm does before it suspends a job
    for number in (signal.SIGSTOP, signal.SIGCONT) * 2:
        os.kill(ranks["continued"], number)
        if number == signal.SIGSTOP:
            time.sleep(1.2)
    os.kill(ranks["stopped"], signal.SIGSTOP)
    os.kill(ranks["suspended"], signal.SIGSTOP)
    os.kill(stubs["suspended"].pid, signal.SIGSTOP)
    assert stubs["stopped"].wait(10) == -signal.SIGKILL
    assert time.monotonic() - begin > 2 * 1.2 + 1.5
    time.sleep(1.0)
    os.kill(stubs["suspended"].pid, signal.SIGCONT)
    os.kill(ranks["suspended"], signal.SIGCONT)
    recorded = Failure(**json.loads(server._run.failure.read_text()))
    assert recorded == Failure("stopped by SIGSTOP for 2 s", 0, host(), 147)
    assert gone(ranks["stopped"])
    for name in names[1:]:
        assert stubs[name].poll() is None
        os.kill(ranks[name], signal.SIGCONT)
        stubs[name].terminate()
        assert stubs[name].wait(10) == -signal.SIGTERM


def test_a_server_that_cannot_fork_leaves_the_rank_to_its_process(server, tmp_path, monkeypatch):
    (tmp_path / "one_fork.py").write_text(
        "import errno, os\n"
        "fork, left = os.fork, [1]\n"
        "def limited():\n"
        "    if not left:\n"
        "        raise OSError(errno.EAGAIN, 'Resource temporarily unavailable')\n"
        "    return left.pop() and fork()\n"
        "os.fork = limited\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr(fork_server, "PRELOADED", ("one_fork",))
    first, second = forked(server, "wait"), forked(server, "wait")
    parents = {psutil.Process(pid_of(each)).ppid() for each in (first, second)}
    assert len(parents & {server._process.pid}) == 1
    assert len(parents & {first.pid, second.pid}) == 1
    for each in (first, second):
        each.terminate()
        assert each.wait(10) == -signal.SIGTERM


def test_a_rank_for_which_there_is_no_process_is_one_line(tmp_path, monkeypatch):
    def fork():
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(os, "_exit", sys.exit)
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    with pytest.raises(SystemExit):
        forked_rank.watch_executed([sys.executable], str(tmp_path / "failure"))
    recorded = json.loads((tmp_path / "failure").read_text())
    assert recorded["rank"] == 3
    assert "no process could be started for it: Resource temporarily" in recorded["reason"]


def test_a_rank_that_is_asked_to_stop_is_no_failure(server):
    server._run.logs.mkdir()
    process = forked(server, "wait")
    pid_of(process)
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    assert not server._run.failure.exists()


def test_a_server_that_cannot_import_leaves_the_error_to_the_rank(server, monkeypatch):
    monkeypatch.setattr(fork_server, "PRELOADED", ("no_such_module",))
    process = forked(server, "exit", "5")
    assert process.wait(20) == 5


def test_ranks_of_a_supervisor_that_ended_may_end_by_themselves(server):
    process = forked(server, "wait")
    pid_of(process)
    server._process.stdin.close()
    with pytest.raises(subprocess.TimeoutExpired):
        server._process.wait(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    assert server._process.wait(10) == 0
    server._process.stdin = open(os.devnull, "wb")  # noqa: SIM115 (for close)


@pytest.mark.parametrize(
    "words", [("/bin/sh", "-c", "true"), (sys.executable, "-O", "a.py"), (sys.executable,)]
)
def test_other_commands_are_not_forked(server, words):
    assert server.address(Command(words)) == ""
    assert server._process is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, True), ({"hosts": "a:2"}, False), ({"launcher": "srun"}, False)],
)
def test_whether_all_ranks_are_here(changes, expected):
    assert only_here(Launch(**changes)) == expected
