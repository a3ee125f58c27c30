"""Rules that decide the global batch and the learning rate: pure functions of what was observed."""

from hpc_absa.schedules.build import build
from hpc_absa.schedules.rule import Growth, Milestones, Rate, Rule

__all__ = ["Growth", "Milestones", "Rate", "Rule", "build"]
