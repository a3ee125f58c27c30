"""What a user's script does that all ranks must do alike, in the same order.

Each rank counts these calls. Those that wait for each other exchange what they are, on a channel of
their own, so that different ones end all ranks with one line. A rank that waits elsewhere, as for
the gradients of a step that another rank does not take, is found by its heartbeats, which carry the
last call and its number.
"""

from __future__ import annotations

from collections import Counter
from enum import IntEnum
from typing import Any

from hpc_absa.comm import Communicator
from hpc_absa.errors import CollectiveError, ExitStatus


class Call(IntEnum):
    """A call; in a mark, below `KINDS`."""

    BEGIN = 1
    CONTINUE = 2
    REDUCE = 3
    SUM = 4
    EVALUATE = 5
    LEAVE = 6


KINDS = 8

WITHOUT_EXCHANGE = (Call.CONTINUE, Call.REDUCE)
"""Calls after which a rank waits elsewhere for the others, or not at all."""

PAST = {
    Call.BEGIN: "began its loop over the run",
    Call.CONTINUE: "continued its loop",
    Call.REDUCE: "took another step",
    Call.SUM: "called run.sum",
    Call.EVALUATE: "ended evaluate",
    Call.LEAVE: "left the loop or the with block",
}


class Calls:
    """The calls of one rank."""

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self.mark = self._before = 0
        """Number of the last call times `KINDS`, plus its kind."""
        self.step = 0
        """Optimizer steps taken."""

    def enter(self, call: Call) -> None:
        """Count a call."""
        self._before, self.mark = self.mark, (self.mark // KINDS + 1) * KINDS + call

    def exchange(self, call: Call, value: Any = None) -> list[Any]:
        """Count a call; returns the values of all ranks (a collective).

        Raises:
            CollectiveError: on all ranks, where another one is in another call.
        """
        self.enter(call)
        ranks = self._comm.exchange_calls((call, value))
        kinds = [kind for kind, _ in ranks]
        [(most, count), *_] = Counter(kinds).most_common()
        if count < len(ranks):
            other = next(rank for rank, kind in enumerate(kinds) if kind != most)
            message = self._difference(other, kinds[other], kinds.index(most), most)
            raise CollectiveError(message, ExitStatus.USAGE)
        return [value for _, value in ranks]

    def conflict(self, rank: int, mark: int) -> str | None:
        """What another rank with this mark has done where this one went on in its loop."""
        call = mark % KINDS
        for own in (self.mark, self._before):
            same_number, goes_on = own // KINDS == mark // KINDS, own % KINDS in WITHOUT_EXCHANGE
            if same_number and goes_on and call not in WITHOUT_EXCHANGE:
                return self._difference(rank, Call(call), self._comm.rank, Call(own % KINDS))
        return None

    def _difference(self, rank: int, call: Call, other_rank: int, other: Call) -> str:
        return (
            f"absa.Run: after step {self.step}, rank {rank} {PAST[call]}, and rank {other_rank} "
            f"{PAST[other]}: expected the same on all ranks"
        )
