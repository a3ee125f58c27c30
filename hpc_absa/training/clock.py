"""Where the seconds of a phase go."""

from __future__ import annotations

import time
from collections.abc import Callable

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
        self._charging = {kind: _Charging(self, kind) for kind in KINDS}
        self.restart()

    def restart(self) -> None:
        """Set all kinds to zero."""
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._since = time.perf_counter()

    def __call__(self, kind: str) -> _Charging:
        """Charge the body to `kind`, except for what another call within it takes."""
        return self._charging[kind]

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


class _Charging:
    """A context manager that is made once, because a generator takes 2 µs."""

    def __init__(self, clock: Clock, kind: str) -> None:
        self._clock, self._kind = clock, kind

    def __enter__(self) -> None:
        self._clock._charge()
        self._clock._open.append(self._kind)

    def __exit__(self, *error: object) -> None:
        self._clock._charge()
        self._clock._open.pop()
