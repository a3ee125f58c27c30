"""Building what a rank trains with from a job file and the newest checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from hpc_absa import config, summation, worldsize
from hpc_absa.checkpoint import CheckpointManager
from hpc_absa.checkpoint.async_checkpointer import AsyncCheckpointer
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.config import Job
from hpc_absa.curvature.loss import Loss
from hpc_absa.data.datasets import MapDataset
from hpc_absa.data.loader import Loader
from hpc_absa.errors import CheckpointError, UsageError
from hpc_absa.models import build as build_model
from hpc_absa.models import build_loss
from hpc_absa.models.losses import IGNORED
from hpc_absa.models.weights import read_weights
from hpc_absa.plan import stream_of
from hpc_absa.progress import Position, Progress, SampleStream
from hpc_absa.rundir import RunDir
from hpc_absa.schedules import Rule
from hpc_absa.schedules import build as build_rule
from hpc_absa.training import metrics
from hpc_absa.training import optimizer as optimizers
from hpc_absa.training.clock import Clock
from hpc_absa.training.data import (
    DataSet,
    build_loader,
    evaluation_batch,
    hessian_sample,
    hessian_samples,
    open_data,
)
from hpc_absa.training.estimator import Estimator, make_estimator
from hpc_absa.training.faults import StopRequest
from hpc_absa.training.layer_curvature import LayerCurvature
from hpc_absa.training.layer_precision import LayerPrecision
from hpc_absa.training.layer_rates import LayerRates, split_groups
from hpc_absa.training.log import EventLogger
from hpc_absa.training.memory import keep_freed_memory
from hpc_absa.training.metrics import Metric
from hpc_absa.training.reduction import (
    LocalReduction,
    OverlappedReduction,
    Reduction,
    ReproducibleReduction,
)
from hpc_absa.training.resume import previous_end, resume
from hpc_absa.training.run import Run, RunOptions
from hpc_absa.training.state import TrainState, load_model, to_array
from hpc_absa.training.step import StepEngine
from hpc_absa.training.trainer import Adversary, Trainer


def build_trainer(
    job: Job,
    directory: RunDir,
    comm: Communicator,
    clock: Clock,
    stop: StopRequest,
    console: TextIO,
    allow_changed: tuple[str, ...],
) -> Trainer:
    """Everything that the job names, with the state of the newest good checkpoint (a collective).

    Raises:
        CollectiveError: on all ranks, for a user's error on any rank.
    """
    torch.set_num_threads(threads_per_rank(job, comm.local_size))
    device = raise_on_all_ranks(comm, lambda: device_of(job, comm))
    if device.type == "cuda":
        clock.synchronize = torch.cuda.synchronize
    if job.train.reproducible:
        make_reproducible(comm)
    dataset = open_data(job, directory, comm)
    stream = stream_of(job, len(dataset.train))
    loader = raise_on_all_ranks(comm, lambda: build_loader(job, dataset, stream, device))
    model, loss = raise_on_all_ranks(comm, lambda: build_model_and_loss(job, dataset, device))
    measured = raise_on_all_ranks(comm, lambda: build_metrics(job, dataset, loss))
    rule = raise_on_all_ranks(comm, lambda: build_rule(job, stream.samples))
    optimizer = raise_on_all_ranks(
        comm,
        lambda: optimizers.build(job.train, job.optimizer.arguments, model, lr=job.train.lr),
    )
    hessian, curvature, rates, precision = job.hessian, None, None, None
    if hessian.layer_rates != "off" or hessian.layer_precision != "off":
        curvature = build_layer_curvature(job, model, loss, loader, stream, comm)
    if hessian.layer_rates != "off":
        split_groups(optimizer)
    if curvature and hessian.layer_precision != "off":
        precision = LayerPrecision(
            curvature, hessian.layer_precision, hessian.layer_precision_limit
        )
    progress = Progress(Position(), rule.initial())
    state = TrainState(model, optimizer, progress, with_groups=hessian.layer_rates != "off")
    if precision:
        state.others = {"layer_precision": precision}
    manager = CheckpointManager(directory.checkpoints, job.checkpoint.keep)
    resumed_from = resume(job, dataset.digest, manager, comm, state, stream, allow_changed)
    if resumed_from is None and job.model.weights:
        raise_on_all_ranks(comm, lambda: load_weights(job, model))
    engine = build_engine(job, model, optimizer, comm, clock)
    if curvature and hessian.layer_rates != "off":
        rates = LayerRates(engine, curvature, hessian.layer_rates, hessian.layer_rate_bound)
        rates.apply()
    sample_of = raise_on_all_ranks(comm, lambda: hessian_samples(job, loader, stream))
    run = build_run(
        job,
        directory,
        comm,
        stop,
        EventLogger(directory, comm.rank, console),
        state,
        rule,
        stream,
        engine,
        make_estimator(job, state, loss, comm, sample_of),
        manager,
        data_digest=dataset.digest,
        resumed_from=resumed_from,
    )
    epsilon = getattr(job.schedule, "epsilon", None)
    reader = loader.reader
    clamped = getattr(job.schedule, "clamp", "range") == "range"
    valid = reader.input_range() if clamped else None
    adversary = Adversary(epsilon * reader.input_scale(), valid) if epsilon else None
    return Trainer(
        run,
        loader,
        loss,
        adversary,
        metrics=measured,
        evaluation_batch=evaluation_batch(job, dataset),
        bfloat16=job.train.precision == "bfloat16",
        reproducible=job.train.reproducible,
        names=(f"model.name = {job.model.name!r}", f"train.loss = {job.train.loss!r}"),
        rates=rates,
        precision=precision,
    )


def build_layer_curvature(
    job: Job,
    model: nn.Module,
    loss: Loss,
    loader: Loader,
    stream: SampleStream,
    comm: Communicator,
) -> LayerCurvature:
    """What measures the curvature of each layer, on the sample of λ."""
    return LayerCurvature(
        model,
        loss,
        hessian_sample(job, loader, stream, job.hessian.samples),
        comm,
        microbatch=stream.microbatch,
        reproducible=job.train.reproducible,
    )


def build_engine(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    comm: Communicator,
    clock: Clock,
    update: Callable[[float], None] | None = None,
) -> StepEngine:
    """What takes the steps; `update` as in `StepEngine`."""
    keep_freed_memory()
    reduction: Reduction
    if job.train.reproducible:
        reduction = ReproducibleReduction(model, comm)
    elif comm.size == 1:
        reduction = LocalReduction(model)
    else:
        reduction = OverlappedReduction(model, comm)
    return StepEngine(
        model,
        optimizer,
        reduction,
        seed=job.seed,
        clock=clock,
        max_grad_norm=job.train.max_grad_norm,
        update=update,
    )


def build_run(
    job: Job,
    directory: RunDir,
    comm: Communicator,
    stop: StopRequest,
    log: EventLogger,
    state: TrainState,
    rule: Rule,
    stream: SampleStream,
    engine: StepEngine,
    estimator: Estimator,
    manager: CheckpointManager,
    *,
    data_digest: str,
    resumed_from: str | None,
    rank_limit: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> Run:
    """The run of these parts, with the settings of the job.

    Without `rank_limit`, the largest number of ranks is the job's; `environment` is added to
    `phase_start` events.
    """
    checkpointer = AsyncCheckpointer(
        manager,
        comm,
        background=job.checkpoint.background,
        shard_bytes=job.checkpoint.shard_bytes,
        on_error=job.checkpoint.on_error,
        warn=log.save_failed,
    )
    limit = rank_limit or worldsize.limit(job)
    options = RunOptions(
        seed=job.seed,
        data_digest=data_digest,
        job=config.dump(job),
        save_seconds=job.checkpoint.every_seconds,
        rank_limit=limit,
        ranks_for=lambda batch: worldsize.ranks_for(job, batch, limit),
        on_nonfinite_loss=job.train.on_nonfinite_loss,
        resumed_from=resumed_from,
        previous_end=previous_end(directory),
        environment={
            "threads_per_rank": torch.get_num_threads(),
            "device": str(engine.device),
            **(environment or {}),
        },
    )
    return Run(
        comm=comm,
        directory=directory,
        stream=stream,
        rule=rule,
        state=state,
        engine=engine,
        estimator=estimator,
        checkpointer=checkpointer,
        stop=stop,
        log=log,
        options=options,
    )


# Parts


def build_model_and_loss(
    job: Job, dataset: DataSet, device: torch.device
) -> tuple[nn.Module, Loss]:
    """The job's model, with initial weights that depend on its seed alone, and its loss."""
    torch.manual_seed(job.seed)
    model = build_model(job.model.name, job.model.arguments, **dataset.offered)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise UsageError(
                f"model.name = {job.model.name!r}: the parameter {name} of a lazy layer has no "
                "shape yet: give the number of its inputs, or call the model once where it is built"
            )
    model.train()
    layout = torch.channels_last if job.train.channels_last else torch.preserve_format
    arguments, smoothing = job.loss.arguments, job.train.label_smoothing
    if smoothing:
        arguments = {"label_smoothing": smoothing, **arguments}
    loss = build_loss(job.train.loss, arguments)
    return model.to(device, memory_format=layout), loss  # type: ignore[call-overload]


def load_weights(job: Job, model: nn.Module) -> None:
    """Start from the weights in the file `model.weights`.

    Raises:
        UsageError: it cannot be read, or its names and shapes are not the model's.
    """
    name = f"model.weights = {job.model.weights!r}"
    try:
        arrays = read_weights(Path(os.path.expanduser(job.model.weights)))
    except UsageError as error:
        raise UsageError(f"model.weights: {error}") from error
    kept = tuple(job.model.weights_skip)
    own = {key: to_array(tensor) for key, tensor in model.state_dict().items()}
    given = {key: array for key, array in arrays.items() if not kept or not key.startswith(kept)}
    for key, array in own.items():
        # batch norm's counters, which many programs do not save
        if (kept and key.startswith(kept)) or key.endswith("num_batches_tracked"):
            given.setdefault(key, array)
    try:
        load_model(model, given, name)
    except CheckpointError as error:
        problem = str(error).replace("the checkpoint", "the file")
        raise UsageError(
            f"{problem}; expected the model's names and shapes, but for those that begin as in "
            "model.weights_skip"
        ) from error


def build_metrics(job: Job, dataset: DataSet, loss: Loss) -> tuple[Metric, ...]:
    """What is measured on the test set: what the job names, or what suits its loss."""
    given = job.loss.arguments.get("ignore_index", IGNORED)
    ignored = given if isinstance(given, int) else IGNORED
    if job.train.metrics is not None:
        chosen = tuple(metrics.build(name, loss, ignored) for name in job.train.metrics)
        names = [metric.name for metric in chosen]
        if len(set(names)) < len(names):
            raise UsageError(f"train.metrics = {names}: expected different names")
        return chosen
    if isinstance(dataset, MapDataset):
        targets = dataset.example.targets
        classes, sequences = 0, isinstance(targets, Tensor) and targets.dim() > 1
    else:
        labels = dataset.train.labels
        classes, sequences = len(dataset.classes) * (labels.ndim == 1), labels.ndim > 1
    return metrics.default(job.train.loss, loss, ignored, classes=classes, sequences=sequences)


def threads_per_rank(job: Job, local_size: int) -> int:
    """CPU threads of this rank: the job's, or the cores of the host divided among its ranks.

    A reproducible job uses one, because the order of a kernel's own sums depends on it.
    """
    if job.train.threads_per_rank:
        return job.train.threads_per_rank
    return 1 if job.train.reproducible else max(1, len(os.sched_getaffinity(0)) // local_size)


def device_of(job: Job, comm: Communicator) -> torch.device:
    """This rank's device: a GPU of its own if the job allows it and the host has GPUs."""
    gpus = torch.cuda.device_count() if job.train.device != "cpu" else 0
    if job.train.device == "cuda" and not gpus:
        raise UsageError("train.device = 'cuda': no GPU here; expected a host with one GPU a rank")
    if not gpus:
        return torch.device("cpu")
    if comm.local_size > gpus:
        raise UsageError(
            f"{comm.local_size} ranks on a host with {gpus} GPUs: expected one GPU a rank; "
            "lower ranks.max, name more hosts, or set train.device = 'cpu'"
        )
    torch.cuda.set_device(comm.local_rank)
    return torch.device("cuda", comm.local_rank)


def make_reproducible(comm: Communicator) -> None:
    def check() -> None:
        if not summation.fits(comm.size):
            raise UsageError(
                f"train.reproducible = true on {comm.size} ranks: "
                f"expected a power of two up to {summation.LANES}"
            )

    raise_on_all_ranks(comm, check)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
