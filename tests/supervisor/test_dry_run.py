"""`--dry-run` prints exactly the command that would be executed."""

import os
import signal
import subprocess
import sys

import pytest

from hpc_absa import cli
from hpc_absa.cli import running
from hpc_absa.rundir import RunDir
from hpc_absa.supervisor import launchers
from tests.mpi.jobs import write_job

RECORDER = """#!/bin/sh
{ for word in "$0" "$@"; do printf '%s\\0' "$word"; done; env -0 | sort -z; } >>"$RECORD"
exit 1
"""


@pytest.fixture(name="recorder")
def _recorder(tmp_path, monkeypatch):
    """A launcher that records how it was called and starts nothing."""
    path = tmp_path / "a launcher"
    path.write_text(RECORDER)
    path.chmod(0o755)
    monkeypatch.setattr(launchers, "program", lambda name: str(path))
    monkeypatch.setattr(running, "write_report", lambda *_: None)
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    handlers = {number: signal.getsignal(number) for number in signal.Signals if number < 32}
    yield tmp_path / "record"
    for number, handler in handlers.items():
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, handler)


def record(path):
    """Arguments and variables of the only call.

    Without variables that a shell sets, and the process that stands for a rank on this host.
    """
    recorded = path.read_bytes().split(b"\0")
    for place, word in enumerate(recorded):
        if word.endswith(b"/forked_rank.py"):
            del recorded[place - 3 : place + 3]
            break
    path.unlink()
    return [
        word for word in recorded if not word.startswith((b"_=", b"SHLVL=", b"PWD=", b"OLDPWD="))
    ]


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--launcher", "horovodrun"],
        ["-H", "localhost:2", "--set", "launch.interface=lo", "--set", "launch.bind=core"],
        ["--set", 'launch.extra=["--tag-output", "a b"]', "--allow-changed", "train.lr"],
    ],
    ids=["mpirun", "horovodrun", "hosts", "extra"],
)
def test_the_printed_command_is_the_executed_one(recorder, tmp_path, monkeypatch, capsys, words):
    run = RunDir(tmp_path / "run")
    begin = ["hpc-absa", "run", str(write_job(tmp_path)), "--run-dir", str(run.path), *words]
    begin += ["--set", "launch.max_restarts=0"]

    def command(*more):
        monkeypatch.setattr(sys, "argv", [*begin, *more])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out

    printed = command("--dry-run")
    assert not run.path.exists()
    subprocess.run(["sh", "-c", printed], env=os.environ, check=False)
    as_printed = record(recorder)
    command()
    assert record(recorder) == as_printed
    assert b"HPC_ABSA_SUPERVISED=1" in as_printed
    # and the launcher's log begins with it
    (log,) = run.logs.glob("world-*.log")
    assert log.read_text().splitlines()[0] == f"$ {printed.rstrip()}"
