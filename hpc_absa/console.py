"""Console output that never decides how a run ends.

A closed pipe or terminal, a full disk and an encoding without λ cost what is printed, and nothing
else. `prepare` is for every command; `never_fail` is for commands that run jobs. Commands whose
result is their output keep their errors: `hpc-absa plan JOB --json >/dev/full` must fail.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

SUBSTITUTES = {
    **{"λ": "lambda", "→": "->", "·": "|", "×": "x", "…": "...", "\u202f": " "},
    **{"█": "#", "░": ".", "–": "-", "α": "alpha", "κ": "kappa", "≤": "<="},
}
"""For encodings without these characters; any other character becomes a question mark."""

QUEUE_LINES = 10_000
"""Lines that wait for a terminal that does not accept any, such as one after Ctrl-S."""
FOOTER_SECONDS = 0.5
"""Between two updates of the line below all others."""
CLEAR_LINE = "\r\x1b[K"
CLOSE_SECONDS = 2.0
"""`LineQueue.close` waits so long for a console that accepts nothing."""


def prepare() -> None:
    """Make standard output and error exist, and replace the characters that they cannot show."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed, as by `>&-`: the next file opened would get this descriptor
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", closefd=False))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="substitute")


def _substitute(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(SUBSTITUTES.get(character, "?") for character in text), error.end


codecs.register_error("substitute", _substitute)


def never_fail() -> None:
    """From now on, writing to standard output or error never raises."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with contextlib.suppress(io.UnsupportedOperation):  # not a file, as in tests
            descriptor = stream.fileno()
            finish(stream)
            setattr(sys, name, tolerant(descriptor, stream.encoding))


def finish(stream: TextIO) -> bool:
    """Flush `stream`; whether all of it was written. What was not is dropped.

    Python would try again at its exit, and replace the exit status by 120.
    """
    try:
        stream.flush()
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
        return False
    return True


def tolerant(descriptor: int, encoding: str = "utf-8") -> TextIO:
    """A text stream to `descriptor` in which no write fails; it is not closed with the stream."""
    raw = _Tolerant(descriptor)
    return io.TextIOWrapper(raw, encoding, "substitute", write_through=True)  # type: ignore[type-var]


class _Tolerant(io.RawIOBase):
    """Writes without a buffer: a thread that waits for a terminal holds no lock of the stream."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: bytes) -> int:  # type: ignore[override]
        left = memoryview(data)
        with contextlib.suppress(OSError):
            while left:
                left = left[os.write(self._descriptor, left) :]
        return len(data)


class LineQueue:
    """Shows lines in a thread, so that whoever prints one neither waits nor fails.

    Where the console accepts nothing for long, lines are dropped; the logs have them.
    """

    def __init__(
        self, show: Callable[[str], None], footer: Callable[[int], str] | None = None
    ) -> None:
        """
        Args:
            show: prints a line.
            footer: the line below all others for a number of columns, such as a progress bar; it
                is shown on a terminal only, from the first line on.
        """
        self._show, self._footer = show, footer if is_terminal(sys.stdout) else None
        self._lines: queue.Queue[str] = queue.Queue(QUEUE_LINES)
        self._last_shown = time.monotonic()
        self._shown_footer, self._closing = "", False
        threading.Thread(target=self._work, name="console", daemon=True).start()

    def __call__(self, line: str) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line)

    def close(self) -> None:
        """Wait until all lines are shown, or the console has accepted none for some time."""
        begin = time.monotonic()
        self._closing = True
        while self._lines.unfinished_tasks or self._shown_footer:
            if time.monotonic() - max(begin, self._last_shown) > CLOSE_SECONDS:
                return
            time.sleep(0.01)

    def _work(self) -> None:
        timeout: float | None = None
        while True:
            try:
                line = self._lines.get(timeout=timeout)
            except queue.Empty:
                self._show_footer()
                continue
            timeout = FOOTER_SECONDS if self._footer else None
            with contextlib.suppress(Exception):
                self._clear_footer()
                self._show(line)
            self._last_shown = time.monotonic()
            self._lines.task_done()
            if self._lines.empty():
                self._show_footer()

    def _show_footer(self) -> None:
        with contextlib.suppress(Exception):
            columns = os.get_terminal_size(sys.stdout.fileno()).columns - 1
            text = "" if self._closing or not self._footer else self._footer(columns)
            if text != self._shown_footer:
                self._clear_footer()
                print(text, end="", flush=True)
                self._shown_footer = text

    def _clear_footer(self) -> None:
        if self._shown_footer:
            print(CLEAR_LINE, end="", flush=True)
            self._shown_footer = ""


def is_terminal(stream: TextIO) -> bool:
    """Whether `stream` is a terminal that can clear a line."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def rich_console(stderr: bool = False) -> Console:
    """A console on which names and messages are plain text: `[red]` and `:smile:` mean nothing."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False)
