"""Ends a world in which a rank does not answer any more, and says which one.

Every rank tells the next one each second that it lives, in a thread and over MPI. A rank that is
stopped (SIGSTOP), swapped out or on a host that died falls silent, while the others, which wait for
it in a collective for ever, go on telling. A rank whose own work is stuck in an endless loop still
tells, and is not noticed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hpc_absa.comm import Communicator

PERIOD = 1.0
"""Seconds between two signs of life."""

PAUSED = 5 * PERIOD
"""A watcher that itself got no time for so long has been paused, as all its world may have been."""


class Watchdog:
    """Watches the rank before this one in the ring of ranks."""

    def __init__(
        self,
        comm: Communicator,
        hosts: list[str],
        silence: float,
        end: Callable[[str, int, str], None],
    ) -> None:
        """Begins to watch.

        Args:
            comm: the world.
            hosts: of all ranks.
            silence: seconds after which a rank that gives no sign of life is given up.
            end: gets the reason, the rank that is to blame and its host, and ends the world.
        """
        self._comm, self._hosts, self._silence, self._end = comm, hosts, silence, end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if comm.size > 1:
            self._thread.start()

    def close(self) -> None:
        """Stop watching; only where no rank waits for another any more."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        before = (self._comm.rank - 1) % self._comm.size
        heard = woken = time.monotonic()
        while not self._over.wait(PERIOD):
            now = time.monotonic()
            if self._comm.beat() or now - woken > PAUSED:
                heard = now
            woken = now
            if now - heard > self._silence:
                where = self._hosts[before]
                reason = f"rank {before} on {where} has not answered for {now - heard:.0f} s"
                self._end(reason, before, where)
                return
