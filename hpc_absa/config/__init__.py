"""The job file (TOML): its tables, reading it, and continuing a run with a changed one."""

from hpc_absa.config.file import (
    WITHOUT_EFFECT,
    dump,
    from_tables,
    load,
    parse,
    read,
    refuse_changes,
    validate,
)
from hpc_absa.config.script import Launchable, Script
from hpc_absa.config.tables import (
    LOSSES,
    METRICS,
    OPTIMIZERS,
    Checkpoint,
    Data,
    Hessian,
    Job,
    Launch,
    Loss,
    Model,
    Optimizer,
    Ranks,
    Train,
)
from hpc_absa.schedules import SCHEDULES, USER_DEFINED

__all__ = [
    "LOSSES",
    "METRICS",
    "OPTIMIZERS",
    "SCHEDULES",
    "USER_DEFINED",
    "WITHOUT_EFFECT",
    "Checkpoint",
    "Data",
    "Hessian",
    "Job",
    "Launch",
    "Launchable",
    "Loss",
    "Model",
    "Optimizer",
    "Ranks",
    "Script",
    "Train",
    "dump",
    "from_tables",
    "load",
    "parse",
    "read",
    "refuse_changes",
    "validate",
]
