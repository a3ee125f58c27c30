"""The job file (TOML): what it may say, reading it, and going on with a changed one."""

from hpc_absa.config.base import Count, Fraction, Named, Positive, Section
from hpc_absa.config.changes import WITHOUT_EFFECT, refuse_changes
from hpc_absa.config.file import dump, from_tables, load, parse
from hpc_absa.config.schedule import (
    OWN,
    SCHEDULES,
    AdaptiveBatch,
    AdversarialAdaptiveBatch,
    Baseline,
    FacebookRule,
    GoogleRule,
    NoiseScale,
    OwnRule,
    Schedule,
    TunedAdversarialAdaptiveBatch,
)
from hpc_absa.config.tables import Checkpoint, Data, Hessian, Job, Launch, Model, Ranks, Train

__all__ = [
    "OWN",
    "SCHEDULES",
    "WITHOUT_EFFECT",
    "AdaptiveBatch",
    "AdversarialAdaptiveBatch",
    "Baseline",
    "Checkpoint",
    "Count",
    "Data",
    "FacebookRule",
    "Fraction",
    "GoogleRule",
    "Hessian",
    "Job",
    "Launch",
    "Model",
    "Named",
    "NoiseScale",
    "OwnRule",
    "Positive",
    "Ranks",
    "Schedule",
    "Section",
    "Train",
    "TunedAdversarialAdaptiveBatch",
    "dump",
    "from_tables",
    "load",
    "parse",
    "refuse_changes",
]
