"""`hpc-absa verify`: whether checkpoints are what they were when they were written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpc_absa.checkpoint import file
from hpc_absa.checkpoint.store import require_name
from hpc_absa.errors import CheckpointError, ExitStatus
from hpc_absa.rundir import RunDir


@dataclass(frozen=True)
class Verification:
    """What was found about one checkpoint."""

    path: Path
    exit_status: ExitStatus
    error: str | None = None
    """What is wrong with it; None where it is good."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"path": str(self.path), "good": self.error is None, "error": self.error}


def verify(path: Path) -> list[Verification]:
    """Check one file, or all checkpoints of a run directory, oldest first; never raises."""
    if not path.is_dir():
        return [_verify(path)]
    run = RunDir(path)
    if run.checkpoints.is_dir():
        found = run.checkpoint_files()
    else:
        found = sorted(file for file in path.glob("*.h5") if not file.name.startswith("."))
    if not found:
        return [Verification(path, ExitStatus.USAGE, "no checkpoint in this folder")]
    return [_verify(checkpoint) for checkpoint in found]


def _verify(path: Path) -> Verification:
    try:
        require_name(path, file.read(path).attributes)
    except file.NotACheckpointError as error:
        return Verification(path, ExitStatus.USAGE, _bare(path, error))
    except CheckpointError as error:
        return Verification(path, ExitStatus.FAILED, _bare(path, error))
    return Verification(path, ExitStatus.OK)


def _bare(path: Path, error: CheckpointError) -> str:
    return str(error).removeprefix(f"{path}: ")
