"""Everything a rank needs to train, built from the job and the newest checkpoint."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hpc_absa import job as jobs
from hpc_absa.checkpoint import Content, Store
from hpc_absa.comm import Communicator
from hpc_absa.course import Course, Position
from hpc_absa.data import order
from hpc_absa.data.batches import Batches
from hpc_absa.data.packed import PackedDataset
from hpc_absa.data.prepare import prepare
from hpc_absa.errors import CheckpointError, UsageError
from hpc_absa.job import Job
from hpc_absa.models import build as build_model
from hpc_absa.models.losses import build_loss
from hpc_absa.plan import course_of
from hpc_absa.rundir import RunDir
from hpc_absa.schedules import Rule
from hpc_absa.schedules import build as build_rule
from hpc_absa.training.agreement import agreed
from hpc_absa.training.clock import Clock
from hpc_absa.training.reduction import LANES, Overlapped, Reduction, Reproducible
from hpc_absa.training.state import Live, Progress, broadcast, restore
from hpc_absa.training.statistics import RunningStatistics
from hpc_absa.training.step import Adversary, Loss, Stepper

HESSIAN_ORDER = 2**32 - 1
"""The "epoch" whose order gives the Hessian sample: no epoch of a run."""


@dataclass(frozen=True)
class HessianSample:
    """Training images in a fixed order, un-augmented; a smaller sample is a prefix of it."""

    batches: Batches
    indices: Any
    """int64 `[samples]`."""

    @property
    def size(self) -> int:
        """Samples available."""
        return len(self.indices)

    def load(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of positions `[start, stop)`."""
        return self.batches.sample(self.indices[start:stop])


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
        AgreedError: on all ranks, for anything a user can mend.
    """
    threads = threads_per_rank(job, comm.local_size)
    torch.set_num_threads(threads)
    device = agreed(comm, lambda: _device(job, comm))
    _make_reproducible(job, comm)
    packed = packed_path(job, run)
    if any(comm.gather_objects(not packed.exists())):
        agreed(comm, lambda: _open(job, packed) if comm.rank == 0 else None)
    dataset = agreed(comm, lambda: _open(job, packed))
    course = course_of(job, len(dataset.train.labels))
    batches = Batches(
        dataset,
        course,
        job.seed,
        padding=_padding(job, dataset),
        flip=job.data.name != "digits" if job.data.flip is None else job.data.flip,
        device=device,
    )
    model, loss = agreed(comm, lambda: _model(job, dataset, device))
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=job.train.lr,
        momentum=job.train.momentum,
        weight_decay=job.train.weight_decay,
    )
    rule = build_rule(job)
    store = Store(run.checkpoints, job.checkpoint.keep, background=job.checkpoint.background)
    statistics = RunningStatistics(model)
    live, progress = Live(model, optimizer, None), Progress(Position(), rule.initial())
    live, progress, origin = _resume(job, dataset, store, comm, live, progress, allow_changed)
    reduction: Reduction
    reduction = (Reproducible if job.train.reproducible else Overlapped)(model, comm)
    stepper = Stepper(
        model, loss, optimizer, statistics, reduction, _adversary(job, batches), clock, job.seed
    )
    indices = order.permutation(job.seed, HESSIAN_ORDER, course.samples)[: job.hessian.samples]
    parts = Parts(
        job,
        dataset,
        course,
        rule,
        batches,
        loss,
        HessianSample(batches, indices),
        stepper,
        store,
        clock,
        device,
        threads,
    )
    return parts, live, progress, origin


def threads_per_rank(job: Job, local_size: int) -> int:
    """CPU threads of this rank: the job's, or the host's cores divided among its ranks.

    A reproducible job takes one, because the order of a kernel's own sums depends on it.
    """
    if job.train.threads_per_rank:
        return job.train.threads_per_rank
    return 1 if job.train.reproducible else max(1, len(os.sched_getaffinity(0)) // local_size)


def _resume(
    job: Job,
    dataset: PackedDataset,
    store: Store,
    comm: Communicator,
    live: Live,
    progress: Progress,
    allow_changed: tuple[str, ...],
) -> tuple[Live, Progress, str | None]:
    """The newest good checkpoint: read once by rank 0, then broadcast."""

    def read() -> tuple[str, Content] | None:
        loaded = store.newest_good()
        if loaded is None:
            return None
        for damaged in loaded.damaged:
            print(f"passed over a checkpoint: {damaged}", flush=True)
        _check(job, dataset, loaded.content, str(loaded.path), allow_changed)
        return loaded.path.name, loaded.content

    found = agreed(comm, lambda: read() if comm.rank == 0 else None)
    origin = comm.broadcast_object(found[0] if found else None)
    if origin is None:
        return live, progress, None
    content = broadcast(found[1] if found else None, comm)
    live, progress = agreed(comm, lambda: restore(content, live, origin))
    return live, progress, origin


def _check(
    job: Job, dataset: PackedDataset, content: Content, path: str, allowed: tuple[str, ...]
) -> None:
    """Refuse a checkpoint that this job cannot go on from with the same result."""
    digest = content.groups["data"].attributes["digest"]
    if digest != dataset.digest:
        raise CheckpointError(f"{path}: of another data set: {digest}, not {dataset.digest}")
    saved = jobs.parse(str(content.groups["job"].attributes["text"]), path)
    jobs.refuse_changes(saved, job, path, allowed)


def packed_path(job: Job, run: RunDir) -> Path:
    """Where the packed form of the job's data lies: the root itself, beside it, or in the run."""
    root = Path(job.data.root).expanduser()
    if root.suffix == ".h5":
        return root
    if job.data.root and os.access(root.parent, os.W_OK):
        return root.with_name(f"{root.name}.h5")
    return run.data / f"{job.data.name.replace(':', '.')}.h5"


def _open(job: Job, packed: Path) -> PackedDataset:
    """The packed data set, packed first where it is absent."""
    if not packed.exists():
        if job.data.root.endswith(".h5"):
            raise UsageError(f"data.root = {job.data.root!r}: no such file")
        packed.parent.mkdir(parents=True, exist_ok=True)
    root = Path(job.data.root).expanduser() if job.data.root else None
    dataset = prepare(job.data.name, root, job.data.arguments, packed)
    if len(dataset.train.labels) < job.train.microbatch:
        raise UsageError(
            f"train.microbatch = {job.train.microbatch}: expected at most the "
            f"{len(dataset.train.labels)} training samples of {job.data.name}"
        )
    return dataset


def _padding(job: Job, dataset: PackedDataset) -> int:
    if job.data.padding is not None:
        return job.data.padding
    return 0 if job.data.name == "digits" else dataset.image_size // 8


def _device(job: Job, comm: Communicator) -> torch.device:
    gpus = torch.cuda.device_count() if job.train.device != "cpu" else 0
    if job.train.device == "cuda" and not gpus:
        raise UsageError("train.device = 'cuda': no GPU here; expected a host with one a rank")
    if not gpus:
        return torch.device("cpu")
    if comm.local_size > gpus:
        raise UsageError(
            f"{comm.local_size} ranks on a host with {gpus} GPUs: expected one GPU a rank; "
            "lower ranks.max, name more hosts, or set train.device = 'cpu'"
        )
    torch.cuda.set_device(comm.local_rank)
    return torch.device("cuda", comm.local_rank)


def _make_reproducible(job: Job, comm: Communicator) -> None:
    if not job.train.reproducible:
        return

    def check() -> None:
        if comm.size & (comm.size - 1) or comm.size > LANES:
            raise UsageError(
                f"train.reproducible = true on {comm.size} ranks: "
                f"expected a power of two up to {LANES}"
            )

    agreed(comm, check)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def _model(job: Job, dataset: PackedDataset, device: torch.device) -> tuple[nn.Module, Loss]:
    torch.manual_seed(job.seed)
    model = build_model(
        job.model.name,
        job.model.arguments,
        dataset.channels,
        dataset.image_size,
        len(dataset.classes),
    )
    return model.to(device), build_loss(job.train.loss, {})


def _adversary(job: Job, batches: Batches) -> Adversary | None:
    if not isinstance(job.schedule, jobs.AdversarialAdaptiveBatch):
        return None
    return Adversary(job.schedule.epsilon * batches.pixel_scale, batches.pixel_range)
