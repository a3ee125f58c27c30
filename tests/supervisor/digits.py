"""The shipped digits job, with overrides."""

from __future__ import annotations

from pathlib import Path

from hpc_absa import config

PATH = Path(__file__).resolve().parents[2] / "jobs" / "digits.toml"


def digits(*overrides: str) -> config.Job:
    """`jobs/digits.toml` with `key=value` overrides."""
    return config.load(PATH, overrides)
