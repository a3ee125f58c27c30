"""The shipped digits job with overrides, and checkpoints of a run of it."""

from __future__ import annotations

from pathlib import Path

from hpc_absa import config
from hpc_absa.checkpoint import CheckpointManager, Content
from hpc_absa.rundir import RunDir
from tests.checkpoint.contents import content

PATH = Path(__file__).resolve().parents[2] / "jobs" / "digits.toml"


def digits(*overrides: str) -> config.Job:
    """`jobs/digits.toml` with `key=value` overrides."""
    return config.load(PATH, overrides)


def save(run: RunDir, step: int, **attributes: int) -> Path:
    """Write a checkpoint with these root attributes; returns its path."""
    small = content(step)
    path = run.checkpoint(step, 1)
    whole = Content({**small.attributes, **attributes}, small.groups)
    return CheckpointManager(run.checkpoints, 3).publish(path, whole).path
