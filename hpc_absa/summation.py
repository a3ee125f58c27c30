"""One fixed tree for sums over microbatches: the same bits at any power-of-two world size.

Lane `l` of `LANES` holds the microbatches `share(all, l, LANES)`, added one after the other. A rank
owns `LANES / size` neighbouring lanes and adds them up as a binary counter does (`Tree`); ranks
then exchange sums with the partner at distance 1, 2, 4, ...
(`comm.allreduce_recursive_doubling_`). Addition of two numbers commutes exactly, so both partners
hold the same bits, and the tree is the same at any world size.
"""

from __future__ import annotations

from torch import Tensor

from hpc_absa.worldsize import share

LANES = 64
"""Leaves of the tree: the largest world whose bits agree."""


def fits(size: int) -> bool:
    """Whether a world of `size` ranks can walk the tree."""
    return size <= LANES and size & (size - 1) == 0


def lanes(microbatches: range, rank: int, size: int) -> list[range]:
    """The lanes of one rank, in order; empty ones keep the tree's shape."""
    count = LANES // size
    return [share(microbatches, lane, LANES) for lane in range(rank * count, (rank + 1) * count)]


class Tree:
    """Adds up neighbouring lanes: sums of two, then of four, as they become complete."""

    def __init__(self) -> None:
        self._levels: dict[int, Tensor | None] = {}

    def add(self, lane: Tensor | None) -> None:
        """Take in the next lane's sum, to keep; None for a lane without microbatches."""
        level = 0
        while level in self._levels:
            lane = _sum(self._levels.pop(level), lane)
            level += 1
        self._levels[level] = lane

    def total(self) -> Tensor | None:
        """The sum of all lanes, a power of two in number; None where all were empty."""
        (total,) = self._levels.values()
        return total


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Of two subtrees, in the left one's memory; an empty one is left out, which is exact."""
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right)
