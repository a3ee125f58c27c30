"""How a large state is divided among the ranks that write it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from hpc_absa.checkpoint.schema import Key

SUFFIX = ".shard"
"""Not `.h5`: whoever takes the newest `*.h5` of a folder gets a whole checkpoint."""

NAME = re.compile(r"(?P<checkpoint>step-\d{10}-phase-\d{3,})\.[0-9a-f]+\.\d{4}-of-\d{4}\.shard")
"""What `name` gives; other files are the user's."""

SMALL = 1 << 16
"""Bytes below which an array stays in the checkpoint's own file."""


def count(nbytes: int, ranks: int, shard_bytes: int) -> int:
    """Shards of a state of `nbytes`; 0 where one file holds it all.

    No shard is smaller than `shard_bytes` on average, and no rank writes two.
    """
    shards = min(ranks, nbytes // shard_bytes)
    return 0 if shards < 2 else shards


def assign(sizes: Mapping[Key, int], shards: int) -> list[list[Key]]:
    """The arrays of each shard, whole ones, the largest first to the emptiest shard.

    Args:
        sizes: bytes of all arrays; those below `SMALL` belong to none.
        shards: 1 or more.
    """
    shares: list[list[Key]] = [[] for _ in range(shards)]
    filled = [0] * shards
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        if sizes[key] >= SMALL:
            emptiest = filled.index(min(filled))
            shares[emptiest].append(key)
            filled[emptiest] += sizes[key]
    return shares


def name(checkpoint: Path, save: str, number: int, shards: int) -> str:
    """The file name of a checkpoint's shard `number`, from 1; `save` is unique to the save."""
    return f"{checkpoint.stem}.{save}.{number:04d}-of-{shards:04d}{SUFFIX}"


def of(checkpoint: Path) -> list[Path]:
    """Files in the checkpoint's folder that are, or were to be, its shards."""
    return sorted(checkpoint.parent.glob(f"{checkpoint.stem}.*{SUFFIX}"))
