"""Rules that decide the global batch and the learning rate: pure functions of what was observed."""

from hpc_absa.schedules.rule import Rule, build

__all__ = ["Rule", "build"]
