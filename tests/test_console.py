"""Output that cannot be shown costs that output, and nothing else."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hpc_absa import console
from hpc_absa.console import LineQueue, tolerant

JOB = Path(__file__).parents[1] / "jobs" / "digits.toml"


def command(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "hpc_absa", *map(str, words)],
        stderr=subprocess.PIPE,
        timeout=60,
        **options,
    )


def test_a_stream_whose_reader_is_gone_loses_what_is_written():
    reading, writing = os.pipe()
    os.close(reading)
    stream = tolerant(writing)
    for _ in range(3):
        print("λ " * 100_000, file=stream, flush=True)
    os.close(writing)
    print("descriptor closed", file=stream, flush=True)


def test_a_pipe_that_is_full_and_does_not_block_loses_what_is_written():
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    print("x" * (1 << 20), file=tolerant(writing), flush=True)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("utf-8", "λ 3 → 4 · é ☃".encode()),
        ("latin-1", "lambda 3 -> 4 · é ?".encode("latin-1")),
        ("ascii", b"lambda 3 -> 4 | ? ?"),
    ],
)
def test_characters_that_an_encoding_lacks_are_replaced(tmp_path, encoding, shown):
    with (tmp_path / "out").open("wb") as file:
        print("λ 3 → 4 · é ☃", file=tolerant(file.fileno(), encoding), flush=True)
    assert (tmp_path / "out").read_bytes() == shown + b"\n"


@pytest.fixture
def terminal(monkeypatch, capsys):
    monkeypatch.setattr(console, "is_terminal", lambda stream: True)
    monkeypatch.setattr(console, "FOOTER_SECONDS", 0.01)
    monkeypatch.setattr(console.os, "get_terminal_size", lambda _: os.terminal_size((20, 5)))
    monkeypatch.setattr(type(sys.stdout), "fileno", lambda self: 1, raising=False)
    return capsys


def test_the_footer_stays_below_the_lines_and_is_cleared_at_the_end(terminal):
    lines = LineQueue(print, lambda columns: f"bar of {columns}")
    lines("one")
    while "bar" not in (shown := terminal.readouterr().out):
        pass
    lines("two")
    lines.close()
    shown += terminal.readouterr().out
    assert shown.startswith("one\nbar of 19")
    assert "\r\x1b[Ktwo\n" in shown
    assert shown.endswith("two\n") or shown.endswith("\r\x1b[K")


def test_no_footer_before_the_first_line(terminal):
    """It would be before the command that `run --dry-run` prints."""
    lines = LineQueue(print, lambda columns: "bar")
    time.sleep(0.1)
    lines.close()
    assert terminal.readouterr().out == ""


def test_no_footer_where_there_is_no_terminal(capsys):
    lines = LineQueue(print, lambda columns: "bar")
    lines("one")
    lines.close()
    assert capsys.readouterr().out == "one\n"


def test_a_console_that_blocks_does_not_block_the_caller(monkeypatch):
    monkeypatch.setattr("hpc_absa.console.CLOSE_SECONDS", 0.2)
    released, shown = threading.Event(), []
    lines = LineQueue(lambda line: (released.wait(), shown.append(line)))
    for number in range(20_000):
        lines(str(number))
    lines.close()
    assert shown == []
    released.set()
    monkeypatch.setattr("hpc_absa.console.CLOSE_SECONDS", 30)
    lines.close()
    assert shown[:3] == ["0", "1", "2"]


def test_lines_after_one_that_failed_are_shown():
    shown = []

    def show(line):
        if line == "1":
            raise BrokenPipeError
        shown.append(line)

    lines = LineQueue(show)
    for number in range(3):
        lines(str(number))
    lines.close()
    assert shown == ["0", "2"]


def test_a_result_that_was_not_written_is_a_failure():
    with Path("/dev/full").open("w") as full:
        done = command("plan", JOB, "--json", stdout=full)
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_a_command_without_standard_output_has_its_own_exit_status():
    words = f"{sys.executable} -m hpc_absa status /nowhere >&- 2>&-"
    assert subprocess.run(["sh", "-c", words], timeout=60).returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_tables_are_shown_in_a_terminal_without_unicode(tmp_path, encoding):
    (tmp_path / "job.toml").write_text('name = "größe λ"\n', encoding="utf-8")
    (tmp_path / "events.jsonl").write_text(
        '{"event": "decision", "phase": 1, "time": 1, "epoch": 1, "eigenvalue": 2.5}\n'
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = command("status", tmp_path, env=environment, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "größe lambda".encode(encoding, "replace") in done.stdout


def test_markup_in_a_name_is_shown_as_text(tmp_path):
    text = JOB.read_text().replace('name = "digits"', 'name = "[red]a[/b] :smile:"', 1)
    (tmp_path / "job.toml").write_text(text)
    done = command("plan", tmp_path / "job.toml", stdout=subprocess.PIPE)
    assert done.returncode == 0
    assert b"[red]a[/b] :smile:" in done.stdout
