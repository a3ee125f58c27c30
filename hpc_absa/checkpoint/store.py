"""The checkpoints of one run: publish them, list the newest first, keep a few."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpc_absa.checkpoint import file, shards
from hpc_absa.checkpoint.layout import SHARD, Shard
from hpc_absa.checkpoint.schema import Content, Scalar
from hpc_absa.errors import CheckpointError
from hpc_absa.rundir.paths import CHECKPOINT_NAME, checkpoint_files


@dataclass(frozen=True)
class Published:
    """A checkpoint that has reached the disk."""

    path: Path
    bytes: int
    """Of all its files."""
    seconds: float
    """From the hand-over to the verified file."""


class Store:
    """The folder of a run's checkpoints: one process publishes, several may write shards."""

    def __init__(self, folder: Path, keep: int) -> None:
        """`keep` generations survive."""
        self.folder = folder
        self._keep = keep
        self._damaged: set[Path] = set()

    def publish(self, path: Path, content: Content, parts: tuple[Shard, ...] = ()) -> Published:
        """Write and verify a checkpoint; only then may an old generation go.

        Args:
            path: its file, in the folder.
            content: what is in the file itself.
            parts: its shards, durable already.

        Raises:
            CheckpointError: names path and cause; every older checkpoint is as it was.
        """
        begun = time.perf_counter()
        for leftover in self.folder.glob(".step-*.h5.*.tmp"):
            if not leftover.name.startswith(f".{path.stem}."):  # whose writer was killed
                leftover.unlink(missing_ok=True)
        written = file.write(path, content, parts)
        self._damaged.discard(path)
        self._remove_outlived(path, {part.name for part in parts})
        size = written.bytes + sum(part.bytes for part in parts)
        return Published(path, size, time.perf_counter() - begun)

    def write_shard(self, path: Path, save: str, number: int, of: int, content: Content) -> Shard:
        """Write and verify shard `number` of the checkpoint that `path` will be.

        Raises:
            CheckpointError: names path and cause.
        """
        name = shards.name(path, save, number, of)
        marked = Content({**content.attributes, SHARD: number}, content.groups)
        written = file.write(path.with_name(name), marked)
        return Shard(name, written.digest, written.bytes, written.fingerprints)

    def newest_first(self) -> list[Path]:
        """All checkpoints, good or not."""
        return checkpoint_files(self.folder)[::-1]

    def pass_over(self, path: Path) -> None:
        """Remember that a checkpoint is damaged: it does not count as a generation."""
        self._damaged.add(path)

    def _remove_outlived(self, newest: Path, parts: set[str]) -> None:
        # What cannot be removed costs space, not the run.
        with contextlib.suppress(OSError):
            for old in self._outlived(newest):
                with contextlib.suppress(OSError):
                    old.unlink()
            present = {path.stem for path in checkpoint_files(self.folder)}
            for shard in self.folder.glob(f"step-*{shards.SUFFIX}"):
                if not (named := shards.NAME.fullmatch(shard.name)):
                    continue
                stem = named["checkpoint"]
                orphan = stem not in present or (stem == newest.stem and shard.name not in parts)
                if orphan:
                    shard.unlink(missing_ok=True)

    def _outlived(self, newest: Path) -> list[Path]:
        """Checkpoints older than the generations to keep; known damaged ones are no generation."""
        older = [path for path in checkpoint_files(self.folder) if path.name < newest.name]
        kept = self._keep - 1
        good = [path for path in older if path not in self._damaged]
        if len(good) < kept:
            return []
        oldest = good[-kept] if kept else newest
        return [path for path in older if path.name < oldest.name]


@dataclass(frozen=True)
class SavedPhase:
    """What the newest good checkpoint says about the phase that continues from it."""

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
            attributes = file.load(path).outline.attributes
            require_name(path, attributes)
        except CheckpointError:
            continue
        known = {k: attributes.get(k) for k in ("next_ranks", "rank_limit")}
        return SavedPhase(
            int(attributes["step"]),
            int(attributes["global_batch"]),
            *(None if value is None else int(value) for value in known.values()),
        )
    return None


def require_name(path: Path, attributes: Mapping[str, Scalar]) -> None:
    """Refuse another step's checkpoint under a name that a store gives; other names are free.

    Args:
        path: the file.
        attributes: the root's, of the checkpoint in it.

    Raises:
        CheckpointError: name and content differ.
    """
    named, step = CHECKPOINT_NAME.fullmatch(path.name), attributes.get("step")
    if named and int(named["step"]) != step:
        raise CheckpointError(
            f"{path}: damaged: it holds step {step}, not the {int(named['step'])} in its name"
        )


def none_good(folder: Path, damaged: list[str]) -> CheckpointError:
    """The error where no checkpoint of a folder can be resumed from."""
    return CheckpointError(
        f"{folder}: no checkpoint is good; remove the folder to start anew: " + "; ".join(damaged)
    )
