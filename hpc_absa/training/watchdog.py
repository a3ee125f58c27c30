"""Ends a world in which a rank does not answer any more, or gets nowhere, and says which one.

Every rank tells the next one each second that it lives, in a thread and over MPI. A rank that is
stopped (SIGSTOP), swapped out or on a host that died falls silent, while the others, which wait for
it in a collective for ever, go on telling.

A rank that reads from a file system that hangs, or whose model loops for ever, goes on telling too;
but it has been at one microbatch for too long, which the others, that wait for it, have not.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from hpc_absa.comm import Communicator
from hpc_absa.training.clock import Clock

PERIOD = 1.0
"""Seconds between two signs of life."""

PAUSED = 5 * PERIOD
"""A watcher that itself got no time for so long has been paused, as all its world may have been."""


AT_WORK = {"data": "reading", "comp": "computing", "adversarial": "computing"}
"""The clock's kinds that are work on one microbatch and wait for no other rank."""


class Watchdog:
    """Watches this rank, and the one before it in the ring of ranks."""

    def __init__(
        self,
        comm: Communicator,
        hosts: list[str],
        clock: Clock,
        silence: float,
        stuck: float,
        end: Callable[[str, int, str], None],
    ) -> None:
        """Begins to watch.

        Args:
            comm: the world.
            hosts: of all ranks.
            clock: knows what this rank is doing.
            silence: seconds after which a rank that gives no sign of life is given up.
            stuck: seconds that reading or computing one microbatch may take.
            end: gets the reason, the rank that is to blame and its host, and ends the world.
        """
        self._comm, self._hosts, self._clock, self._end = comm, hosts, clock, end
        self._silence, self._stuck = silence, stuck
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop watching; only where no rank waits for another any more."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        before = (self._comm.rank - 1) % self._comm.size
        heard = moved = woken = time.monotonic()
        doing = self._clock.doing()
        while not self._over.wait(PERIOD):
            now = time.monotonic()
            paused, woken = now - woken > PAUSED, now
            if self._comm.exchange_heartbeats() or paused:
                heard = now
            if (present := self._clock.doing()) != doing or paused:
                doing, moved = present, now
            if now - heard > self._silence:
                self._give_up(before, f"has not answered for {now - heard:.0f} s")
                return
            if doing[0] in AT_WORK and now - moved > self._stuck:
                what = f"has been {AT_WORK[doing[0]]} one microbatch for {now - moved:.0f} s"
                self._give_up(self._comm.rank, what)
                return

    def _give_up(self, rank: int, why: str) -> None:
        where = self._hosts[rank]
        self._end(f"rank {rank} on {where} {why}", rank, where)
