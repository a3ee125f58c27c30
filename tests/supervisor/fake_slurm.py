"""Slurm's commands as shell scripts that say what a test wants and note what they were asked."""

from __future__ import annotations

import os
from pathlib import Path

PARTITIONS = (
    "PartitionName=main Default=YES MaxNodes=UNLIMITED State=UP PreemptMode=REQUEUE\n"
    "PartitionName=narrow Default=NO MaxNodes=2 State=UP PreemptMode=OFF\n"
)
NODES = "idle 4\nmixed 4\nallocated 8\ndown* 4\ndrained 4\nidle~ 4\n"


class FakeSlurm:
    """Commands in `folder/bin`; `asked()` is what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._notes = folder / "asked"
        self.says("sbatch", "echo 17")
        self.says("squeue", "")
        self.says("scancel", "")
        self.says("sinfo", f"printf '{NODES}'".replace("\n", "\\n"))
        self.says("scontrol", f"printf '{PARTITIONS}'".replace("\n", "\\n"))

    def says(self, program: str, body: str) -> None:
        path = self.bin / program
        note = f'echo "{program} $*" >>{self._notes}'
        path.write_text(f"#!/bin/sh\n{note}\n{body}\n")
        path.chmod(0o755)

    def asked(self, program: str) -> list[str]:
        """The words of each call of `program`."""
        if not self._notes.exists():
            return []
        lines = self._notes.read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.startswith(f"{program} ")]

    @property
    def path(self) -> str:
        """A PATH on which these come first."""
        return f"{self.bin}:{os.environ['PATH']}"
