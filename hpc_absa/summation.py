"""Sums over microbatches in a fixed order: bit for bit the same for 1, 2, 4 … 64 ranks.

The microbatches are split into `LANES` contiguous lanes, whatever the number of ranks. A rank adds
the microbatches of each of its `LANES / size` neighbouring lanes one after the other, and the lanes
pairwise (`Tree`); a recursive-doubling allreduce (`comm.allreduce_recursive_doubling_`) then
continues the same binary tree over the ranks. Addition of two numbers commutes exactly, so both
partners of an exchange have the same bits.
"""

from __future__ import annotations

from torch import Tensor

from hpc_absa.worldsize import MOST_REPRODUCIBLE, share

LANES = MOST_REPRODUCIBLE
"""Leaves of the tree, and the largest number of ranks."""


def fits(size: int) -> bool:
    """Whether `size` ranks can use the tree."""
    return size <= LANES and size & (size - 1) == 0


def lanes(microbatches: range, rank: int, size: int) -> list[range]:
    """The lanes of one rank, in order, including empty ones."""
    count = LANES // size
    return [share(microbatches, lane, LANES) for lane in range(rank * count, (rank + 1) * count)]


class Tree:
    """Pairwise sum of a power-of-two number of lanes, in order, with log₂ partial sums in memory.

    As in a binary counter, level i holds a complete sum of 2^i lanes.
    """

    def __init__(self) -> None:
        self._levels: dict[int, Tensor | None] = {}

    def add(self, lane: Tensor | None) -> None:
        """Add the next lane's sum, which may be changed; None for an empty lane."""
        level = 0
        while level in self._levels:
            lane = _sum(self._levels.pop(level), lane)
            level += 1
        self._levels[level] = lane

    def total(self) -> Tensor | None:
        """The sum of all lanes; None where all are empty."""
        (total,) = self._levels.values()
        return total


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """In the memory of `left`; leaving out an empty lane is exact."""
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right)
