"""A user's own script and how it is launched: `launch.toml` of its run directory."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field, PositiveInt

from hpc_absa.config.tables import Job, Launch, RankLimits
from hpc_absa.section import Section


class ScriptTrain(Section):
    """What the launcher must know about the training in a script."""

    threads_per_rank: PositiveInt | None = None
    """CPU threads of one rank, as `OMP_NUM_THREADS`; None leaves them to the script."""
    reproducible: ClassVar[bool] = False


class Script(Section):
    """What to launch. Model, data and schedule are in the script itself."""

    name: str
    """Name of the run, for display."""
    command: Annotated[tuple[str, ...], Field(strict=False, min_length=1)]
    """The command of one rank: a program and its arguments."""
    directory: str
    """Folder in which the command is executed, on all hosts."""
    train: ScriptTrain = ScriptTrain()
    """Threads."""
    ranks: RankLimits = RankLimits()
    """How many processes there are."""
    launch: Launch = Launch()
    """How the processes are started."""


Launchable = Job | Script
"""Both have a name, `[ranks]`, `[launch]` and `train.threads_per_rank`."""
