"""`[launch.slurm]`: what every batch job of a chain asks Slurm for."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, PositiveInt, model_validator

from hpc_absa.config.base import Section

Word = Annotated[str, Field(pattern=r"^\S*$")]
"""No spaces and line ends: it goes into a batch script."""


class SlurmOptions(Section):
    """Options of `sbatch` by their long names; empty ones are left to the site's defaults."""

    model_config = ConfigDict(populate_by_name=True)

    partition: Word = ""
    """Partition; its node limit bounds the growth."""
    account: Word = ""
    """Account that is charged."""
    qos: Word = ""
    """Quality of service."""
    constraint: Word = ""
    """Features that nodes must have."""
    time: Word | int = ""
    """Time limit of one job: minutes, or `H:MM:SS`. A run longer than that takes several jobs."""
    gpus_per_node: PositiveInt | None = Field(default=None, alias="gpus-per-node")
    """GPUs of a node, one rank each; a phase with fewer ranks than that asks for fewer."""
    sbatch: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """More words for `#SBATCH` lines, one line each: `["--exclusive", "--mem=0"]`."""
    setup_script: str = ""
    """A shell file of the site that every job sources first: `module load ...`."""
    step: Literal["mpirun", "srun"] = "mpirun"
    """What starts the ranks within a job; `launch.extra` goes to it."""
    signal_seconds: PositiveInt = 120
    """Seconds before the time limit at which a job begins to save and to hand over (ours)."""

    @model_validator(mode="after")
    def _lines_are_options(self) -> SlurmOptions:
        if not all(line.startswith("-") and "\n" not in line for line in self.sbatch):
            raise ValueError(
                f"sbatch = {list(self.sbatch)}: expected options of sbatch, for example --exclusive"
            )
        return self
