"""The tables of a job file; every field with its unit and the origin of its default.

Origins named below: *talk* is the ABSA talk and arXiv:1810.01021, *Goyal* arXiv:1706.02677, *ours*
a choice of this project, with its reason.
"""

from __future__ import annotations

import datetime
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from hpc_absa.schedules import AnySchedule, TrainSettings, class_of
from hpc_absa.section import Count, NonNegative, OpenSection, Positive, Section, Strings

NoSpaces = Annotated[str, Field(pattern=r"^\S*$")]
"""A string that goes into a batch script as one argument."""

OPTIMIZERS = ("sgd", "adamw", "lars", "lamb", "adahessian")
LOSSES = ("cross_entropy", "bce_with_logits", "mse", "l1", "huber")
METRICS = ("accuracy", "top5", "f1", "perplexity", "mse", "mae")
"""Built-in names; `top` with any other number is one as well."""
WITH_MOMENTUM = ("sgd", "lars")

_HOST = re.compile(r"[^\s:,]+(:0*[1-9][0-9]*)?")


def _require_known(key: str, name: str, known: tuple[str, ...], own: str) -> None:
    if ":" not in name and name not in known:
        raise ValueError(f"{key} = {name!r}: expected one of {', '.join(known)}, or {own}")


def _text_of_time(value: Any) -> Any:
    """A time limit such as 04:00:00 without quotes, which is a time of day in TOML, as text."""
    return str(value) if isinstance(value, datetime.time) else value


def is_adaptive(optimizer: str) -> bool:
    """Whether it divides by a root of squared gradients, as Adam and those named after it.

    Their learning rate follows the root of the batch (arXiv:2205.10287), that of SGD the batch.
    """
    name = optimizer.rpartition(":")[2].rpartition(".")[2].lower()
    return any(part in name for part in ("adam", "lamb", "rmsprop", "adagrad"))


class Data(OpenSection):
    """The data set. Other keys go to a `package.module:function` as its arguments."""

    name: str
    """A built-in data set, or `package.module:function`."""
    root: str = ""
    """Folder of the data set, or its packed HDF5 file; empty for data that needs none (digits)."""
    train_samples: PositiveInt | None = None
    """Training samples that are used, chosen at random but always the same; None means all."""
    test_samples: PositiveInt | None = None
    """Test samples that are used, likewise: a quicker evaluation that is less accurate."""
    padding: Count | None = None
    """Pixels of zero padding before the random crop; None takes an eighth of the image, 4 of 32 as
    in He et al. 2016, and none for the 8×8 digits and for user-defined data."""
    flip: bool | None = None
    """Random horizontal flips; None means yes, except for digits and user-defined data, which may
    have a direction."""
    normalize: bool = True
    """Whether inputs are shifted and scaled by the mean and standard deviation of the training set;
    otherwise pixels are from 0 to 1."""
    workers: Count = 0
    """Processes of each rank that read a user-defined `torch.utils.data.Dataset`; 0: the rank reads
    between steps. Without effect for packed data."""
    input_range: Annotated[tuple[float, float], Field(strict=False)] | None = None
    """Smallest and largest valid input, for adversarial examples of data that are no images; None:
    as the data set says, or no limits."""

    @model_validator(mode="after")
    def _check_input_range(self) -> Self:
        if self.input_range and not self.input_range[0] < self.input_range[1]:
            raise ValueError(
                f"input_range = {list(self.input_range)}: expected two numbers, the smaller first"
            )
        return self


class Model(OpenSection):
    """The network. Other keys are the model's own arguments (`depth`, `widen`, `width`, ...)."""

    name: str
    """A built-in model, or `package.module:function`."""
    weights: str = ""
    """File of weights to start from: .pt, .safetensors or .npz; empty: new ones."""
    weights_skip: Strings = ()
    """Beginnings of names, such as `head.`: tensors that keep their new values."""


class Train(TrainSettings):
    """How one step is computed, and for how long to train."""

    optimizer: str = "sgd"
    """`sgd`, `adamw`, `lars` (arXiv:1708.03888), `lamb` (arXiv:1904.00962), `adahessian`
    (arXiv:2006.00719), or `package.module:Class`, a `torch.optim.Optimizer`; `[optimizer]` has its
    other arguments."""
    momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Of `sgd` and `lars`, for which None means 0.9 (talk)."""
    weight_decay: NonNegative = 0.0
    """L2 penalty added to the gradient, or as the optimizer defines it (the talk names none; 5e-4
    is common for CIFAR)."""
    no_decay_norm_bias: bool = False
    """Whether `weight_decay` excludes vectors: batch norm's scale and shift, and biases (Goyal,
    section 5.3)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target spread over all classes (arXiv:1512.00567, section 7)."""
    max_grad_norm: Positive | None = None
    """Largest norm of a step's gradient; a longer one is scaled down to it. None: no limit."""
    drop_last: bool = False
    """Whether each epoch leaves out the samples that do not fill its last microbatch; otherwise a
    microbatch may contain samples of two epochs, and only at the end of the run samples that do not
    fill a step are left out."""
    loss: str = "cross_entropy"
    """`cross_entropy`, `bce_with_logits`, `mse`, `l1`, `huber`, or `package.module:function` of
    (outputs, targets), which returns the mean or (sum, denominator); `[loss]` has its arguments."""
    metrics: Strings | None = None
    """What is measured on the test set beside the loss: `accuracy`, `top5`, `f1`, `perplexity`,
    `mse`, `mae`, or `package.module:function`; the first is shown. None: what suits the loss."""
    on_nonfinite_loss: Literal["stop", "continue"] = "stop"
    """Whether a loss that is infinite or NaN ends the run with an error."""
    threads_per_rank: PositiveInt | None = None
    """CPU threads of one rank; None divides the cores of a host among its ranks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses one GPU per rank if there are GPUs."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` computes forward and backward passes of training in mixed precision; evaluation
    and the Hessian stay float32 (there is no float16, whose range needs a scaled loss)."""
    channels_last: bool = False
    """Images as NHWC in memory: on a CPU 1.4 times as fast for ResNet-20 on 32×32 images."""
    reproducible: bool = False
    """The same weights bit for bit at any power-of-two number of ranks, at most 64; costs speed."""

    @model_validator(mode="before")
    @classmethod
    def _default_momentum(cls, table: Any) -> Any:
        if isinstance(table, dict) and table.get("optimizer", "sgd") in WITH_MOMENTUM:
            return {"momentum": 0.9, **table}
        return table

    @model_validator(mode="after")
    def _check_optimizer(self) -> Self:
        _require_known("optimizer", self.optimizer, OPTIMIZERS, "package.module:Class")
        if self.optimizer in OPTIMIZERS and self.optimizer not in WITH_MOMENTUM and self.momentum:
            raise ValueError(
                f"momentum = {self.momentum:g}: expected none with optimizer = "
                f"{self.optimizer!r}, whose betas are in the table [optimizer]"
            )
        return self

    @model_validator(mode="after")
    def _check_loss_and_metrics(self) -> Self:
        _require_known("loss", self.loss, LOSSES, "package.module:function")
        for name in self.metrics or ():
            if not re.fullmatch("top[1-9][0-9]*", name):
                _require_known("metrics", name, METRICS, "package.module:function")
        return self

    @model_validator(mode="after")
    def _check_label_smoothing(self) -> Self:
        if self.label_smoothing and self.loss != "cross_entropy":
            raise ValueError(
                f"label_smoothing = {self.label_smoothing:g}: expected 0 with loss = {self.loss!r}"
            )
        return self


class Loss(OpenSection):
    """Arguments of the loss, such as `ignore_index`, `weight` or `delta`."""


class Optimizer(OpenSection):
    """Further arguments of the optimizer, such as `nesterov`, `betas` or `eps`."""


class Hessian(Section):
    """How the top eigenvalue is estimated at a decision point."""

    method: Literal["lanczos", "power", "sharpness"] = "lanczos"
    """Lanczos needs about half the products of power iteration (`docs/curvature.md`); `sharpness`:
    in place of λ the critical sharpness along the next update, by forward passes
    (arXiv:2601.16979)."""
    samples: PositiveInt = 256
    """Training samples the Hessian is averaged over. With 256 a usual decision of a CIFAR-10 run
    takes under 1 % of an epoch, with 512 it does not (ours, `benchmarks/curvature.md`)."""
    tol: Annotated[float, Field(gt=0, lt=1)] = 1e-2
    """Estimated relative error at which an estimate has converged (talk). A smaller one does not
    improve decisions: λ scatters by more from sample to sample (`benchmarks/curvature.md`)."""
    max_iter: PositiveInt = 20
    """Matvecs after which an estimate stops, unconverged. With the talk's 10 a tenth of the
    estimates on small networks do not converge (ours, `benchmarks/curvature.md`)."""
    false_growth: Annotated[float, Field(gt=0, le=0.5)] = 1e-3
    """Probability that the batch grows where λ of all data is equal to the threshold, over the
    choice of the sample (ours, `docs/curvature.md`); 0.5: values of random samples are compared
    without their sampling error (talk)."""
    fresh: bool = False
    """Whether each estimate draws other samples, and starts without the vector of the one before
    (the authors' public code); otherwise all are on the same sample."""
    every: PositiveInt | None = None
    """Samples between decision points; None means once an epoch (talk)."""
    layer_rates: Literal["off", "trace", "eigenvalue"] = "off"
    """Whether each weight has a learning rate of its own, by the mean or the top eigenvalue of its
    block of the Hessian at the last decision point (`docs/robustness.md`; talk)."""
    layer_rate_bound: Annotated[float, Field(gt=1)] = 3.0
    """The largest factor of such a rate, and one by the smallest (ours)."""
    layer_precision: Literal["off", "trace", "eigenvalue"] = "off"
    """Whether the least sensitive layers compute in bfloat16 in training, by the mean or the top
    eigenvalue of their block of the Hessian at the last decision point (`docs/robustness.md`;
    talk)."""
    layer_precision_limit: Positive = 1e-4
    """The largest change of the loss, as predicted, by the rounding of their weights (ours)."""


class RankLimits(Section):
    """Between which numbers of ranks a run moves."""

    initial: PositiveInt = 1
    """Ranks of the first phase."""
    max: PositiveInt | None = None
    """Largest number of ranks; None means the slots of the hosts or of the allocation, otherwise
    the cores of this machine, where a job has no more ranks than there are GPUs to use."""

    @model_validator(mode="after")
    def _check_max(self) -> Self:
        if self.max is not None and self.max < self.initial:
            raise ValueError(f"max = {self.max}: expected at least ranks.initial = {self.initial}")
        return self


class Ranks(RankLimits):
    """How many ranks a phase has."""

    microbatches_per_rank: PositiveInt = 1
    """Microbatches of one step that a rank computes before one more rank is added."""


class Checkpoint(Section):
    """When states are saved, besides at every decision point."""

    model_config = ConfigDict(populate_by_name=True)

    every_seconds: PositiveFloat = 600.0
    """Longest time between checkpoints within a phase; a kill loses at most this much (ours)."""
    keep: Annotated[int, Field(ge=2)] = 3
    """Checkpoints kept; at least two, so that there is another one if the newest is damaged."""
    background: bool = Field(default=True, alias="async")
    """Write while training continues."""
    shard_bytes: PositiveInt = 64 << 20
    """Bytes of state per shard: if the state has twice as many or more, each rank writes a file
    with its share (ours)."""
    on_error: Literal["continue", "stop"] = "continue"
    """Whether training continues if a checkpoint cannot be written; if the run needs it (to grow,
    to stop, to end), the run fails in any case."""


class SlurmOptions(Section):
    """Options of `sbatch` by their long names; empty ones keep the site's defaults."""

    model_config = ConfigDict(populate_by_name=True)

    partition: NoSpaces = ""
    """Partition; its node limit bounds the growth."""
    account: NoSpaces = ""
    """Account that is charged."""
    qos: NoSpaces = ""
    """Quality of service."""
    constraint: NoSpaces = ""
    """Features that nodes must have."""
    time: Annotated[NoSpaces | int, BeforeValidator(_text_of_time)] = ""
    """Time limit of one job: minutes, or `H:MM:SS`. A longer run is split into several jobs."""
    gpus_per_node: PositiveInt | None = Field(default=None, alias="gpus-per-node")
    """GPUs of a node, one rank each; a phase with fewer ranks requests fewer."""
    sbatch: Strings = ()
    """Other options, each on its own `#SBATCH` line: `["--exclusive", "--mem=0"]`."""
    setup_script: str = ""
    """A shell file of the site that every job sources first: `module load ...`."""
    step: Literal["mpirun", "srun"] = "mpirun"
    """What starts the ranks within a job; `launch.extra` is passed to it."""
    signal_seconds: PositiveInt = 120
    """Seconds before the time limit at which a job saves and submits the next job (ours)."""

    @model_validator(mode="after")
    def _check_sbatch(self) -> Self:
        if not all(line.startswith("-") and "\n" not in line for line in self.sbatch):
            raise ValueError(
                f"sbatch = {list(self.sbatch)}: expected options of sbatch, for example --exclusive"
            )
        return self


class Launch(Section):
    """How the ranks are started."""

    launcher: Literal["mpirun", "horovodrun", "srun", "slurm"] = "mpirun"
    """Program that starts a phase."""
    hosts: str = ""
    """`host:slots,host:slots` as for `mpirun -H`, filled in this order; empty means the hosts of
    the current scheduler allocation, or this machine."""
    hostfile: str = ""
    """A file with one host per line, `name slots=4` or `name:4`, instead of `hosts`."""
    rsh_agent: str = ""
    """Program that reaches a host: `rsh_agent HOST COMMAND`; empty means ssh, or Open MPI's own."""
    interface: str = ""
    """Network interface for communication, such as `ib0`; empty leaves it to MPI and NCCL."""
    cool_down: Positive = 300.0
    """Seconds for which a host that failed is excluded before it is tried again (ours)."""
    bind: Literal["none", "core"] = "none"
    """`core` binds each rank to as many cores as it has threads (mpirun only); right if the run has
    its nodes exclusively. `none` leaves it to the system (ours: safe on shared nodes)."""
    extra: Strings = ()
    """Arguments passed to the launcher unchanged."""
    max_restarts: Count = 3
    """Restarts after failures without any progress in between before the run fails (ours)."""
    heartbeat_timeout: PositiveFloat = 60.0
    """A phase is killed and restarted if one of its ranks sends no heartbeat for so many seconds;
    ranks send one each second (ours; over Gloo, without MPI, there are no heartbeats)."""
    progress_timeout: PositiveFloat = 1800.0
    """The same if a rank has been reading or computing one microbatch for so many seconds: its
    file system hangs, or its model is in an infinite loop (ours)."""
    start_seconds: PositiveFloat = 600.0
    """A phase is killed if its ranks are not connected after so many seconds (ours)."""
    fork_server: bool | None = None
    """Whether mpirun's ranks on this host are forked from a process that has imported PyTorch, so
    that phases start without the imports (ours); not with `hosts` or `extra`. None: those of job
    files are. In a script, environment variables that PyTorch reads when it is imported, such as
    `OMP_NUM_THREADS`, are then without effect."""
    ranks_per_node: PositiveInt | None = None
    """Ranks on one node of a batch job; None means one per GPU, or as many as have
    `train.threads_per_rank` cores each."""
    slurm: SlurmOptions = SlurmOptions()
    """Options of the batch jobs of launcher `slurm`."""

    @model_validator(mode="after")
    def _check_hosts(self) -> Self:
        hosts = self.hosts.split(",") if self.hosts else []
        if not all(_HOST.fullmatch(host.strip()) for host in hosts):
            raise ValueError(
                f"hosts = {self.hosts!r}: expected host or host:slots, separated by commas"
            )
        if self.hosts and self.hostfile:
            raise ValueError(f"hostfile = {self.hostfile!r}: expected none if hosts is set")
        return self


class Job(Section):
    """A whole job file."""

    name: str
    """Name of the job, for display."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of initial weights, sample order, augmentation and dropout."""
    data: Data
    """The data set."""
    model: Model
    """The network."""
    train: Train
    """Optimizer, learning rate and length of training."""
    optimizer: Optimizer = Optimizer()
    """Further arguments of `train.optimizer`."""
    loss: Loss = Loss()
    """Arguments of `train.loss`."""
    schedule: AnySchedule
    """Batch size and learning rate over the run."""
    hessian: Hessian = Hessian()
    """How the eigenvalue for decisions is estimated."""
    ranks: Ranks = Ranks()
    """How many processes there are."""
    checkpoint: Checkpoint = Checkpoint()
    """When states are saved."""
    launch: Launch = Launch()
    """How the processes are started."""

    @model_validator(mode="before")
    @classmethod
    def _method_defaults(cls, tables: Any) -> Any:
        """Defaults that depend on the method and on the optimizer, for keys that are not set."""
        schedule = class_of(tables.get("schedule")) if isinstance(tables, dict) else None
        if schedule is None or not isinstance(given := tables.get("hessian", {}), dict):
            return tables
        tables = {**tables, "hessian": {**schedule.hessian_defaults, **given}}
        train, table = tables.get("train"), tables["schedule"]
        rule = schedule.model_fields.get("lr_rule")
        if not (isinstance(train, dict) and isinstance(table, dict) and rule):
            return tables
        if is_adaptive(str(train.get("optimizer"))) and rule.default == "linear":
            tables["schedule"] = {"lr_rule": "square-root", **table}
        return tables

    @model_validator(mode="after")
    def _check_precision(self) -> Self:
        if self.hessian.layer_precision != "off" and self.train.precision != "float32":
            raise ValueError(
                f"hessian.layer_precision = {self.hessian.layer_precision!r}: expected "
                f"train.precision = 'float32', got {self.train.precision!r} for all layers"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> Self:
        self.schedule.check(self.train)
        return self
