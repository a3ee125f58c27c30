"""Everything a rank needs to train, built from the job and the newest checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpc_absa import config, summation
from hpc_absa.checkpoint import Content, Store
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.config import Job
from hpc_absa.data.batches import Batches
from hpc_absa.data.packed import PackedDataset
from hpc_absa.errors import CheckpointError, UsageError
from hpc_absa.plan import course_of
from hpc_absa.progress import Course, Position
from hpc_absa.rundir import RunDir
from hpc_absa.schedules import Rule
from hpc_absa.schedules import build as build_rule
from hpc_absa.training.clock import Clock
from hpc_absa.training.material import (
    HessianSample,
    build_batches,
    build_model_and_loss,
    device_of,
    hessian_sample,
    open_data,
    threads_per_rank,
)
from hpc_absa.training.reduction import Overlapped, Reduction, Reproducible
from hpc_absa.training.resuming import newest_good
from hpc_absa.training.sgd import SGD
from hpc_absa.training.state import Live, Progress, restore
from hpc_absa.training.statistics import RunningStatistics
from hpc_absa.training.step import Adversary, Loss, Numerics, Stepper


@dataclass(frozen=True)
class Parts:
    """What the loop works with."""

    job: Job
    dataset: PackedDataset
    course: Course
    rule: Rule
    batches: Batches
    loss: Loss
    hessian_sample: HessianSample
    stepper: Stepper
    store: Store
    clock: Clock
    device: torch.device
    threads: int


def assemble(
    job: Job, run: RunDir, comm: Communicator, clock: Clock, allow_changed: tuple[str, ...]
) -> tuple[Parts, Live, Progress, str | None]:
    """Build all parts and restore the newest good checkpoint (a collective).

    Returns:
        The parts, the live tensors, the progress, and the name of the checkpoint resumed from.

    Raises:
        CollectiveError: on all ranks, for anything a user can mend.
    """
    threads = threads_per_rank(job, comm.local_size)
    torch.set_num_threads(threads)
    device = raise_on_all_ranks(comm, lambda: device_of(job, comm))
    _make_reproducible(job, comm)
    dataset = open_data(job, run, comm)
    course = course_of(job, len(dataset.train.labels))
    batches = build_batches(job, dataset, course, device)
    model, loss = raise_on_all_ranks(comm, lambda: build_model_and_loss(job, dataset, device))
    optimizer = SGD(_groups(job, model), lr=job.train.lr, momentum=job.train.momentum)
    rule = raise_on_all_ranks(comm, lambda: build_rule(job))
    store = Store(run.checkpoints, job.checkpoint.keep)
    statistics = RunningStatistics(model)
    live, progress = Live(model, optimizer, None), Progress(Position(), rule.initial())
    live, progress, origin = _resume(job, dataset, store, comm, live, progress, allow_changed)
    reduction: Reduction
    reduction = (Reproducible if job.train.reproducible else Overlapped)(model, comm)
    stepper = Stepper(
        model,
        loss,
        optimizer,
        statistics,
        reduction,
        _adversary(job, batches),
        clock,
        job.seed,
        Numerics(job.train.precision == "bfloat16", job.train.max_grad_norm),
    )
    parts = Parts(
        job,
        dataset,
        course,
        rule,
        batches,
        loss,
        hessian_sample(job, batches, course, job.hessian.samples),
        stepper,
        store,
        clock,
        device,
        threads,
    )
    return parts, live, progress, origin


def _resume(
    job: Job,
    dataset: PackedDataset,
    store: Store,
    comm: Communicator,
    live: Live,
    progress: Progress,
    allow_changed: tuple[str, ...],
) -> tuple[Live, Progress, str | None]:
    """Go on from the newest good checkpoint, where there is one."""
    found = newest_good(store, comm)
    if found is None:
        return live, progress, None
    if comm.rank == 0:
        for damaged in found.damaged:
            print(f"passed over a checkpoint: {damaged}", flush=True)
    name = found.path.name

    def accept() -> tuple[Live, Progress]:
        _check(job, dataset, found.content, str(found.path), allow_changed)
        return restore(found.content, live, name, type(progress.schedule))

    return *raise_on_all_ranks(comm, accept), name


def _check(
    job: Job, dataset: PackedDataset, content: Content, path: str, allowed: tuple[str, ...]
) -> None:
    """Refuse a checkpoint that this job cannot go on from with the same result."""
    digest = content.groups["data"].attributes["digest"]
    if digest != dataset.digest:
        raise CheckpointError(f"{path}: of another data set: {digest}, not {dataset.digest}")
    saved = config.parse(str(content.groups["job"].attributes["text"]), path, warn=False)
    config.refuse_changes(saved, job, path, allowed)


def _make_reproducible(job: Job, comm: Communicator) -> None:
    if not job.train.reproducible:
        return

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


def _groups(job: Job, model: nn.Module) -> list[dict[str, Any]]:
    """The parameters with their weight decay; batch norm's and biases are vectors or scalars."""
    trained = [p for p in model.parameters() if p.requires_grad]
    spared = [p for p in trained if p.dim() < 2 and job.train.no_decay_norm_bias]
    kept = [p for p in trained if p.dim() >= 2 or not job.train.no_decay_norm_bias]
    groups = [(kept, job.train.weight_decay), (spared, 0.0)]
    return [{"params": some, "weight_decay": decay} for some, decay in groups if some]


def _adversary(job: Job, batches: Batches) -> Adversary | None:
    epsilon = getattr(job.schedule, "epsilon", None)
    return epsilon and Adversary(epsilon * batches.pixel_scale, batches.pixel_range)
