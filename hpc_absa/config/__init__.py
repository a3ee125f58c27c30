"""The job file (TOML): its tables, reading it, and continuing a run with a changed one."""

from hpc_absa.config.file import (
    WITHOUT_EFFECT,
    dump,
    explain,
    from_tables,
    load,
    parse,
    read,
    refuse_changes,
)
from hpc_absa.config.tables import (
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
    "OPTIMIZERS",
    "SCHEDULES",
    "USER_DEFINED",
    "WITHOUT_EFFECT",
    "Checkpoint",
    "Data",
    "Hessian",
    "Job",
    "Launch",
    "Loss",
    "Model",
    "Optimizer",
    "Ranks",
    "Train",
    "dump",
    "explain",
    "from_tables",
    "load",
    "parse",
    "read",
    "refuse_changes",
]
