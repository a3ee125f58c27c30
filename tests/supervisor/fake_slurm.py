"""Slurm's commands as shell scripts that print what a test wants and record their arguments."""

from __future__ import annotations

import os
from pathlib import Path

PARTITIONS = (
    "PartitionName=main Default=YES MaxNodes=UNLIMITED State=UP PreemptMode=REQUEUE\n"
    "PartitionName=narrow Default=NO MaxNodes=2 State=UP PreemptMode=OFF\n"
)
NODES = "idle 4\nmixed 4\nallocated 8\ndown* 4\ndrained 4\nidle~ 4\n"


class FakeSlurm:
    """Commands in `folder/bin`; `calls()` is what they were called with."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self._calls = folder / "calls"
        self.respond("sbatch", "echo 17")
        self.respond("squeue", "")
        self.respond("scancel", "")
        self.respond("sinfo", f"printf '{NODES}'".replace("\n", "\\n"))
        self.respond("scontrol", f"printf '{PARTITIONS}'".replace("\n", "\\n"))

    def respond(self, program: str, body: str) -> None:
        path = self.bin / program
        record = f'echo "{program} $*" >>{self._calls}'
        path.write_text(f"#!/bin/sh\n{record}\n{body}\n")
        path.chmod(0o755)

    def calls(self, program: str) -> list[str]:
        """The arguments of each call of `program`."""
        if not self._calls.exists():
            return []
        lines = self._calls.read_text().splitlines()
        return [line.partition(" ")[2] for line in lines if line.startswith(f"{program} ")]

    @property
    def path(self) -> str:
        """A PATH on which these come first."""
        return f"{self.bin}:{os.environ['PATH']}"
