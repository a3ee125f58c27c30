"""Where the seconds of a phase go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

KINDS = (
    "comp",
    "adversarial",
    "comm",
    "hessian",
    "diagonal",
    "data",
    "eval",
    "checkpoint",
    "start",
    "rehearsal",
    "other",
)


class Clock:
    """Charges every second to exactly one kind: the innermost one open, `other` outside of all."""

    def __init__(self) -> None:
        self.synchronize: Callable[[], None] = lambda: None
        """Waits for the device, so that its time is charged to the kind that used it."""
        self._open = ["other"]
        self.restart()

    def restart(self) -> None:
        """Set all kinds to zero."""
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        """Charge the body to `kind`, except for what another call within it takes."""
        self._charge()
        self._open.append(kind)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def activity(self) -> tuple[str, float]:
        """The kind that is open, and a number that changes with every change; from any thread."""
        return self._open[-1], self._since

    def add(self, kind: str, seconds: float) -> None:
        """Charge time from before this clock was made."""
        self._seconds[kind] += seconds

    def seconds(self) -> dict[str, float]:
        """Seconds by kind since the last restart; their sum is the wall time."""
        self._charge()
        return dict(self._seconds)

    def _charge(self) -> None:
        self.synchronize()
        now = time.perf_counter()
        self._seconds[self._open[-1]] += now - self._since
        self._since = now
