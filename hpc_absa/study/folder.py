"""A sweep's folder: a run directory a cell, and which cells failed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from hpc_absa import config
from hpc_absa.rundir import RunDir
from hpc_absa.study.sweep import Cell


@dataclass(frozen=True)
class Failure:
    """How a cell's last try ended."""

    exit_status: int
    reason: str
    """The last thing it said."""


@dataclass(frozen=True)
class StudyDir:
    """A sweep's files; constructing one touches no disk."""

    path: Path

    @property
    def jobs(self) -> Path:
        """Folder of the cells' job files."""
        return self.path / "jobs"

    @property
    def tables(self) -> Path:
        """Folder of the tables."""
        return self.path / "tables"

    @property
    def failed(self) -> Path:
        """Cells that failed, as JSON."""
        return self.path / "failed.json"

    def cell(self, cell: Cell) -> RunDir:
        """The run directory of a cell."""
        return RunDir(self.path / cell.name)

    def job(self, cell: Cell) -> Path:
        """The job file of a cell."""
        return self.jobs / f"{cell.name}.toml"

    def log(self, cell: Cell) -> Path:
        """What the cell's supervisor printed."""
        return self.jobs / f"{cell.name}.log"

    def prepare(self, cells: tuple[Cell, ...], allow_changed: tuple[str, ...] = ()) -> None:
        """Write the cells' job files.

        Raises:
            UsageError: a cell was begun with another job.
        """
        for cell in cells:
            begun = self.cell(cell).job
            if begun.exists():
                config.refuse_changes(config.load(begun), cell.job, str(begun), allow_changed)
        self.jobs.mkdir(parents=True, exist_ok=True)
        for cell in cells:
            self.job(cell).write_text(config.dump(cell.job), encoding="utf-8")

    def failures(self) -> dict[str, Failure]:
        """By cell name."""
        try:
            kept = json.loads(self.failed.read_text(encoding="utf-8"))
            return {name: Failure(**fields) for name, fields in kept.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return {}

    def keep_failures(self, failures: Mapping[str, Failure]) -> None:
        """Put them on disk, whole or not at all."""
        temporary = self.failed.with_suffix(f".{os.getpid()}.json")
        text = json.dumps({name: asdict(failure) for name, failure in failures.items()}, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")
        os.replace(temporary, self.failed)
