"""The checkpoints of one run: publish in the background, find the newest good one, keep a few."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpc_absa.checkpoint import file
from hpc_absa.checkpoint.schema import Content
from hpc_absa.errors import CheckpointError


@dataclass(frozen=True)
class Published:
    """A checkpoint that has reached the disk."""

    path: Path
    bytes: int
    seconds: float
    """From the snapshot's hand-over to the verified file."""


@dataclass(frozen=True)
class Loaded:
    """The newest good checkpoint, and the damaged newer ones that were passed over."""

    path: Path
    content: Content
    damaged: tuple[str, ...]


class Store:
    """The folder of a run's checkpoints, written by one process at a time."""

    def __init__(self, folder: Path, keep: int, *, background: bool = True) -> None:
        """`keep` generations survive; at most one save is in flight."""
        self._folder = folder
        self._keep = keep
        self._background = background
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._damaged: set[Path] = set()

    def save(
        self, path: Path, content: Content, then: Callable[[Published], None] = lambda _: None
    ) -> None:
        """Publish `content`, which must not change any more; `then` is called once it is durable.

        Waits for the save before it. In the background where the store is so; its error is raised
        by the next `save` or `wait`.
        """
        self.wait()
        if not self._background:
            self._publish(path, content, then)
            return
        self._thread = threading.Thread(
            target=self._guarded, args=(path, content, then), name="checkpoint"
        )
        self._thread.start()

    def wait(self) -> None:
        """Return once nothing is in flight.

        Raises:
            CheckpointError: what a background save ran into.
        """
        if self._thread:
            self._thread.join()
            self._thread = None
        if self._error:
            error, self._error = self._error, None
            raise error

    def newest_good(self) -> Loaded | None:
        """The newest checkpoint that verifies, None where there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, and every one is damaged.
        """
        damaged: list[str] = []
        for path in reversed(listed(self._folder)):
            try:
                return Loaded(path, file.read(path), tuple(damaged))
            except CheckpointError as error:
                damaged.append(str(error))
                self._damaged.add(path)
        if damaged:
            raise CheckpointError(
                f"{self._folder}: no checkpoint is good; remove the folder to start anew: "
                + "; ".join(damaged)
            )
        return None

    def _guarded(self, path: Path, content: Content, then: Callable[[Published], None]) -> None:
        try:
            self._publish(path, content, then)
        except Exception as error:
            self._error = error

    def _publish(self, path: Path, content: Content, then: Callable[[Published], None]) -> None:
        begun = time.perf_counter()
        for leftover in self._folder.glob(".*.h5.*.tmp"):
            leftover.unlink(missing_ok=True)  # of a process that was killed while it wrote
        size = file.write(path, content)
        self._damaged.discard(path)
        then(Published(path, size, time.perf_counter() - begun))
        # Only now, with a verified successor, may an old generation go.
        for old in self._outlived(path):
            # What cannot be removed costs space, not the run.
            with contextlib.suppress(OSError):
                old.unlink()

    def _outlived(self, newest: Path) -> list[Path]:
        """Checkpoints older than the generations to keep; known damaged ones are no generation."""
        older = [path for path in listed(self._folder) if path.name < newest.name]
        kept = self._keep - 1
        good = [path for path in older if path not in self._damaged]
        if len(good) < kept:
            return []
        oldest = good[-kept] if kept else newest
        return [path for path in older if path.name < oldest.name]


def listed(folder: Path) -> list[Path]:
    """A folder's checkpoints, oldest first; temporary files begin with a dot and do not count."""
    return sorted(path for path in folder.glob("*.h5") if not path.name.startswith("."))
