"""The one place where names in a run directory are built."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """A run's files (`docs/run-directory.md`); constructing one touches no disk."""

    path: Path

    @property
    def job(self) -> Path:
        """The resolved job file."""
        return self.path / "job.toml"

    @property
    def events(self) -> Path:
        """The append-only event log."""
        return self.path / "events.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints, newest last by name."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """Folder of the ranks' output."""
        return self.path / "logs"

    @property
    def data(self) -> Path:
        """Folder of data sets packed for this run alone."""
        return self.path / "data"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def report(self) -> Path:
        """The self-contained HTML page."""
        return self.path / "report.html"

    @property
    def figure(self) -> Path:
        """The report's figure as a picture."""
        return self.path / "report.png"

    @property
    def lock(self) -> Path:
        """Held by the one supervisor (or lone world) that may write here."""
        return self.path / "lock"

    @property
    def stop_request(self) -> Path:
        """Asks the ranks to save and stop by existing, whatever launchers do with signals."""
        return self.path / "stop"

    @property
    def failure(self) -> Path:
        """Left by the first rank that fails, for the supervisor to read and remove."""
        return self.logs / "failure.json"

    @property
    def joined(self) -> Path:
        """Tells the supervisor by existing that all ranks of its world have found each other."""
        return self.logs / "joined"

    @property
    def chain(self) -> Path:
        """Folder of the batch jobs that carry the run from phase to phase (launcher `slurm`)."""
        return self.path / "chain"

    def link_script(self, number: int) -> Path:
        """The batch script of the chain's link `number`, from 1."""
        return self.chain / f"{number:04d}.sh"

    def link_record(self, number: int) -> Path:
        """Which job is link `number`; existing means that it was submitted, once and for all."""
        return self.chain / f"{number:04d}.json"

    def link_log(self, number: int) -> Path:
        """What the batch job of link `number` printed."""
        return self.logs / f"link-{number:04d}.log"

    def checkpoint(self, step: int, phase: int) -> Path:
        """The checkpoint after `step` optimizer steps; names sort by age."""
        return self.checkpoints / f"step-{step:010d}-phase-{phase:03d}.h5"

    def rank_log(self, phase: int, rank: int) -> Path:
        """What one rank printed from the phase in which it was started."""
        return self.logs / f"phase-{phase:03d}-rank-{rank:04d}.log"

    def write_job(self, text: str) -> None:
        """Put the resolved job in place, whole or not at all: a kill costs nothing."""
        temporary = self.path / f".job.{os.getpid()}.toml"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.job)

    def create(self) -> RunDir:
        """Make the folders; existing ones are left as they are."""
        for folder in (self.path, self.checkpoints, self.logs):
            os.makedirs(folder, exist_ok=True)
        return self
