"""The checkpoints of one run: publish, keep a few, verify."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_absa.checkpoint import file
from hpc_absa.checkpoint.file import SHARD_SUFFIX
from hpc_absa.checkpoint.format import SHARD, Content, Key, Written
from hpc_absa.checkpoint.integrity import NotACheckpointError
from hpc_absa.errors import CheckpointError, ExitStatus
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.paths import checkpoint_files

SHARD_NAME = re.compile(
    r"(?P<checkpoint>step-\d{10}-phase-\d{3,})\.[0-9a-f]+\.\d{4}-of-\d{4}\.shard"
)
"""Name of a shard; other files are the user's."""

Write = Callable[[Path, Content, tuple[Written, ...]], Written]
"""As `file.write`."""

SMALL_ARRAY = 1 << 16
"""Bytes below which an array stays in the checkpoint's own file."""


@dataclass(frozen=True)
class Published:
    path: Path
    bytes: int
    """Of all its files."""
    seconds: float
    """From the start of the save until it was on disk and verified."""


class CheckpointManager:
    """The folder of a run's checkpoints: one process publishes, several may write shards."""

    def __init__(self, folder: Path, keep: int) -> None:
        """`keep` good checkpoints are kept."""
        self.folder = folder
        self._keep = keep
        self._damaged: set[Path] = set()

    def publish(
        self,
        path: Path,
        content: Content,
        shards: tuple[Written, ...] = (),
        write: Write | None = None,
    ) -> Published:
        """Write and verify a checkpoint, whose `shards` were written before; remove the oldest.

        Args:
            path: the checkpoint's file.
            content: of that file.
            shards: files with further arrays.
            write: instead of `file.write`.

        Raises:
            CheckpointError: names path and cause; all older checkpoints are unchanged.
        """
        start = time.perf_counter()
        for leftover in self.folder.glob(".step-[0-9]*-phase-*.tmp"):  # whose writer was killed
            if not leftover.name.startswith(f".{path.stem}."):
                leftover.unlink(missing_ok=True)
        written = (write or file.write)(path, content, shards)
        self._damaged.discard(path)
        self._remove_old(path, {shard.name for shard in shards})
        size = written.bytes + sum(shard.bytes for shard in shards)
        return Published(path, size, time.perf_counter() - start)

    def write_shard(
        self,
        path: Path,
        save: str,
        number: int,
        of: int,
        content: Content,
        write: Write | None = None,
    ) -> Written:
        """Write and verify shard `number`, from 1, of the checkpoint to be published at `path`.

        Args:
            path: the checkpoint's file.
            save: unique to the save.
            number: of the shard.
            of: how many shards there are.
            content: arrays under the names they have in the checkpoint.
            write: instead of `file.write`.

        Raises:
            CheckpointError: names path and cause.
        """
        name = f"{path.stem}.{save}.{number:04d}-of-{of:04d}{SHARD_SUFFIX}"
        numbered = Content({**content.attributes, SHARD: number}, content.groups)
        return (write or file.write)(path.with_name(name), numbered, ())

    def mark_damaged(self, path: Path) -> None:
        """A damaged checkpoint does not count among those to keep."""
        self._damaged.add(path)

    def _remove_old(self, newest: Path, shards: set[str]) -> None:
        with contextlib.suppress(OSError):  # what cannot be removed costs space only
            for old in self._outdated(newest):
                with contextlib.suppress(OSError):
                    old.unlink()
            present = {path.stem for path in checkpoint_files(self.folder)}
            for shard in self.folder.glob(f"step-*{SHARD_SUFFIX}"):
                if not (named := SHARD_NAME.fullmatch(shard.name)):
                    continue
                of = named["checkpoint"]
                if of not in present or (of == newest.stem and shard.name not in shards):
                    shard.unlink(missing_ok=True)

    def _outdated(self, newest: Path) -> list[Path]:
        older = [path for path in checkpoint_files(self.folder) if path.name < newest.name]
        good = [*(path for path in older if path not in self._damaged), newest]
        if len(good) < self._keep:
            return []
        return [path for path in older if path.name < good[-self._keep].name]


def shard_count(nbytes: int, ranks: int, shard_bytes: int) -> int:
    """Shards of a state of `nbytes`; 0 if one file contains everything.

    A shard has at least `shard_bytes` on average, and a rank writes at most one.
    """
    shards = min(ranks, nbytes // shard_bytes)
    return 0 if shards < 2 else shards


def assign_shards(sizes: Mapping[Key, int], shards: int) -> list[list[Key]]:
    """The arrays of each shard: the largest first, each to the smallest shard so far.

    Args:
        sizes: bytes of all arrays; those below `SMALL_ARRAY` are in no shard.
        shards: how many.
    """
    shares: list[list[Key]] = [[] for _ in range(shards)]
    filled = [0] * shards
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        if sizes[key] >= SMALL_ARRAY:
            smallest = filled.index(min(filled))
            shares[smallest].append(key)
            filled[smallest] += sizes[key]
    return shares


@dataclass(frozen=True)
class SavedPhase:
    """What the newest good checkpoint contains about the phase that continues from it."""

    step: int
    """Optimizer steps taken."""
    global_batch: int
    """Samples of the next optimizer step."""
    next_ranks: int | None
    """Ranks decided for the next phase; None in checkpoints of earlier versions."""
    rank_limit: int | None
    """Largest number of ranks that the decision could choose; None likewise."""


def saved_phase(folder: Path) -> SavedPhase | None:
    """Read the newest checkpoint in `folder` that verifies; None where there is none.

    Only the checkpoint's own file is verified, not its shards.
    """
    for path in reversed(checkpoint_files(folder)):
        try:
            attributes = file.verify(path).scalars.attributes
        except CheckpointError:
            continue
        ranks, limit = attributes.get("next_ranks"), attributes.get("rank_limit")
        return SavedPhase(
            int(attributes["step"]),
            int(attributes["global_batch"]),
            None if ranks is None else int(ranks),
            None if limit is None else int(limit),
        )
    return None


@dataclass(frozen=True)
class Verification:
    path: Path
    exit_status: ExitStatus
    error: str | None = None
    """What is wrong with it; None for a good one."""

    def to_dict(self) -> dict[str, Any]:
        return {"path": str(self.path), "good": self.error is None, "error": self.error}


def verify(path: Path) -> list[Verification]:
    """Verify one file, or all checkpoints of a folder or run directory, oldest first."""
    files, run = [path], RunDir(path)
    if run.checkpoints.is_dir():
        files = run.checkpoint_files()
    elif path.is_dir():
        others = (file for file in path.glob("*.h5") if not file.name.startswith("."))
        files = checkpoint_files(path) or sorted(others)
    if not files:
        return [Verification(path, ExitStatus.USAGE, "no checkpoint in this folder")]
    return [_verify(checkpoint) for checkpoint in files]


def _verify(path: Path) -> Verification:
    try:
        file.read(path)
    except CheckpointError as error:
        status = ExitStatus.USAGE if isinstance(error, NotACheckpointError) else error.status
        return Verification(path, status, str(error).removeprefix(f"{path}: "))
    return Verification(path, ExitStatus.OK)
