"""The tables of a job file: frozen, unknown keys refused, every field with unit and origin.

Origins named below: *talk* is the ABSA talk and arXiv:1810.01021, *Goyal* arXiv:1706.02677, *Smith*
arXiv:1711.00489, *ours* a choice of this project, with its reason.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from hpc_absa.config.base import Count, Named, Positive, Section
from hpc_absa.config.schedule import HESSIAN, GoogleRule, NoiseScale, Schedule
from hpc_absa.config.slurm import SlurmOptions

_HOST = re.compile(r"[^\s:,]+(:0*[1-9][0-9]*)?")


class Data(Named):
    """The data set. Other keys go to a `package.module:function` as its arguments."""

    root: str = ""
    """Folder of the data set, or its packed HDF5 file; empty for data that needs none (digits)."""
    padding: Count | None = None
    """Pixels of zero padding before the random crop; None takes an eighth of the image, 4 of 32 as
    in He et al. 2016, and none for the 8×8 digits."""
    flip: bool | None = None
    """Random horizontal flips; None means yes, except for digits, which have a direction."""


class Model(Named):
    """The network. Other keys are the model's own arguments (`depth`, `widen`, `width`, ...)."""


class Train(Section):
    """How one step is taken and how many samples are visited."""

    epochs: PositiveInt
    """Passes over the training set."""
    microbatch: PositiveInt
    """Samples of one forward and backward pass on one rank; batch-norm statistics are over it."""
    lr: Positive
    """Learning rate at the base batch."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """SGD momentum (talk)."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """L2 penalty added to the gradient (the talk names none; 5e-4 is common for CIFAR)."""
    no_decay_norm_bias: bool = False
    """Whether `weight_decay` leaves vectors alone: batch norm's scale and shift, and biases (Goyal,
    section 5.3)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes (arXiv:1512.00567, section 7)."""
    max_grad_norm: Positive | None = None
    """Largest norm of a step's gradient; a longer one is shortened to it. None: none is."""
    milestones: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = ()
    """Epochs after which the learning rate is decayed (GG: after which the batch grows)."""
    lr_decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Factor ρ at each milestone (talk, CIFAR-10)."""
    annealing: Literal["milestones", "cosine"] = "milestones"
    """What lowers the learning rate in the long run: `lr_decay` at each milestone, or a cosine that
    reaches zero with the last epoch (arXiv:1608.03983)."""
    drop_last: bool = False
    """Whether each epoch leaves out the samples that do not fill its last microbatch; otherwise a
    microbatch may contain samples of two epochs, and none is left out."""
    loss: str = "cross_entropy"
    """`cross_entropy`, or `package.module:function` of (outputs, targets) returning the mean."""
    threads_per_rank: PositiveInt | None = None
    """CPU threads of one rank; None divides the cores of a host among its ranks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes one GPU a rank where there are GPUs."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` computes forward and backward passes of training in mixed precision; evaluation
    and the Hessian stay float32 (there is no float16, whose range needs a scaled loss)."""
    channels_last: bool = False
    """Pictures as NHWC in memory: on a CPU 1.4 times as fast for ResNet-20 on 32×32 pictures."""
    reproducible: bool = False
    """The same weights bit for bit at any power-of-two world size; costs speed."""

    @model_validator(mode="after")
    def _fits_together(self) -> Train:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones = {list(self.milestones)}: expected rising epochs")
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(
                f"label_smoothing = {self.label_smoothing:g}: expected 0 with a loss of your own "
                f"({self.loss})"
            )
        if self.milestones and self.annealing == "cosine":
            raise ValueError(
                f"milestones = {list(self.milestones)}: expected none with annealing = 'cosine'"
            )
        return self


class Hessian(Section):
    """How the top eigenvalue is estimated at a decision point."""

    method: Literal["lanczos", "power"] = "lanczos"
    """Lanczos needs about half the products of power iteration (`docs/curvature.md`)."""
    samples: PositiveInt = 256
    """Training samples the Hessian is averaged over. At 128 λ scatters by 10–15 %; 256 keep the
    decisions of a CIFAR-10 run under 1 % of its time, 512 do not (ours, `docs/curvature.md`)."""
    tol: Annotated[float, Field(gt=0, lt=1)] = 1e-2
    """Estimated relative error at which an estimate has converged (talk). Less buys nothing for
    decisions: λ scatters by more from sample to sample (`docs/curvature.md`)."""
    max_iter: PositiveInt = 10
    """Matvecs after which an estimate gives up, unconverged (talk)."""
    every: PositiveInt | None = None
    """Samples between decision points; None means once an epoch (talk)."""


class Ranks(Section):
    """How many ranks a phase has."""

    initial: PositiveInt = 1
    """Ranks of the first phase."""
    max: PositiveInt | None = None
    """Largest number of ranks; None means as many as the hosts have cores or GPUs."""
    microbatches_per_rank: PositiveInt = 1
    """Microbatches of one step that a rank should carry before another rank is worth it."""


class Checkpoint(Section):
    """When states are saved, besides at every decision point."""

    model_config = ConfigDict(populate_by_name=True)

    every_seconds: PositiveFloat = 600.0
    """Longest time between checkpoints within a phase: what a kill can cost (ours)."""
    keep: Annotated[int, Field(ge=2)] = 3
    """Generations kept; at least two, so that a damaged one has a predecessor."""
    background: bool = Field(default=True, alias="async")
    """Write in a background thread while training goes on."""
    shard_bytes: PositiveInt = 64 << 20
    """Bytes of state that are worth a file of their own: of a state of twice this or more, each
    rank writes a share (ours)."""
    on_error: Literal["continue", "stop"] = "continue"
    """Whether training goes on where a checkpoint cannot be written; where the run cannot go on
    without it (to grow, to stop, to end) it fails in any case."""


class Launch(Section):
    """How the ranks are started."""

    launcher: Literal["mpirun", "horovodrun", "srun", "slurm"] = "mpirun"
    """Program that starts a phase."""
    hosts: str = ""
    """`host:slots,host:slots` as for `mpirun -H`, filled in this order; empty means the hosts of
    the scheduler's allocation that we are in, or this machine."""
    hostfile: str = ""
    """A file with a host a line, `name slots=4` or `name:4`, in place of `hosts`."""
    rsh_agent: str = ""
    """Program that reaches a host: `rsh_agent HOST COMMAND`; empty means ssh, or Open MPI's own."""
    interface: str = ""
    """Network interface that ranks talk over, as `ib0`; empty leaves the choice to MPI and NCCL."""
    cool_down: Positive = 300.0
    """Seconds for which a host that failed is set aside before it is tried again (ours)."""
    bind: Literal["none", "core"] = "none"
    """`core` binds each rank to as many cores as it has threads; right where a run has its nodes
    for itself. `none` leaves it to the system (ours: safe where others work on the node)."""
    extra: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Words passed to the launcher as they are."""
    max_restarts: Count = 3
    """Restarts after failures without any progress in between before a run is given up (ours)."""
    heartbeat_timeout: PositiveFloat = 60.0
    """A rank that gives no sign of life for so long is given up, its world ended and started again;
    ranks give one each second (ours; over Gloo, without MPI, nobody watches)."""
    progress_timeout: PositiveFloat = 1800.0
    """A rank that has been reading or computing one microbatch for so long is given up likewise:
    its file system hangs, or its model loops (ours)."""
    start_seconds: PositiveFloat = 600.0
    """A world whose ranks have not found each other after so long is ended (ours)."""
    ranks_per_node: PositiveInt | None = None
    """Ranks on one node of a batch job; None means one a GPU, or as many as a node's cores can give
    `train.threads_per_rank` threads each."""
    slurm: SlurmOptions = SlurmOptions()
    """What the batch jobs of launcher `slurm` ask for."""

    @model_validator(mode="after")
    def _hosts_are_a_list(self) -> Launch:
        words = self.hosts.split(",") if self.hosts else []
        if not all(_HOST.fullmatch(word.strip()) for word in words):
            raise ValueError(
                f"hosts = {self.hosts!r}: expected host or host:slots, with commas between"
            )
        if self.hosts and self.hostfile:
            raise ValueError(f"hostfile = {self.hostfile!r}: expected none beside hosts")
        return self


class Job(Section):
    """A whole job file."""

    name: str
    """Name of the job, for people."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights, sample order, augmentation and dropout."""
    data: Data
    """What is learnt from."""
    model: Model
    """What learns."""
    train: Train
    """How steps are taken."""
    schedule: Schedule
    """What decides batch and learning rate."""
    hessian: Hessian = Hessian()
    """How the decisions' eigenvalue is found."""
    ranks: Ranks = Ranks()
    """How many processes there are."""
    checkpoint: Checkpoint = Checkpoint()
    """When states are saved."""
    launch: Launch = Launch()
    """How the processes are started."""

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, tables: Any) -> Any:
        """The method's own defaults, where the `[hessian]` table is silent."""
        schedule = tables.get("schedule") if isinstance(tables, dict) else None
        if not isinstance(schedule, dict):
            return tables
        preset, given = HESSIAN.get(str(schedule.get("method")), {}), tables.get("hessian", {})
        return {**tables, "hessian": {**preset, **given}} if isinstance(given, dict) else tables

    @model_validator(mode="after")
    def _schedules_fit(self) -> Job:
        schedule, train = self.schedule, self.train
        if isinstance(schedule, GoogleRule) and train.annealing == "cosine":
            raise ValueError(
                "train.annealing = 'cosine': expected 'milestones', at which schedule.method = "
                "'gg' grows"
            )
        if isinstance(schedule, NoiseScale) and schedule.base_batch < 2 * train.microbatch:
            raise ValueError(
                f"schedule.base_batch = {schedule.base_batch}: expected at least two microbatches "
                f"of {train.microbatch}, between which gns sees the noise; halve train.microbatch"
            )
        warmup = getattr(schedule, "warmup_epochs", 0)
        if train.annealing == "cosine" and warmup >= train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs = {warmup:g}: expected less than train.epochs = "
                f"{train.epochs}, so that the cosine has a place"
            )
        return self

    @model_validator(mode="after")
    def _batches_are_whole_microbatches(self) -> Job:
        b = self.train.microbatch
        for key in ("base_batch", "max_batch"):
            value = getattr(self.schedule, key)
            if value is not None and value % b:
                raise ValueError(
                    f"schedule.{key} = {value}: expected a multiple of train.microbatch = {b}"
                )
        if self.ranks.max is not None and self.ranks.max < self.ranks.initial:
            raise ValueError(
                f"ranks.max = {self.ranks.max}: expected at least ranks.initial = "
                f"{self.ranks.initial}"
            )
        return self
