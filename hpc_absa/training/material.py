"""What a job names, as live objects: its data, its model and loss, and the device for them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.config import Job
from hpc_absa.data import order
from hpc_absa.data.batches import Batches
from hpc_absa.data.packed import PackedDataset
from hpc_absa.data.prepare import packed_beside, prepare
from hpc_absa.errors import UsageError
from hpc_absa.models import build as build_model
from hpc_absa.models.losses import build_loss
from hpc_absa.progress import Course
from hpc_absa.rundir import RunDir
from hpc_absa.training.step import Loss

HESSIAN_ORDER = 2**32 - 1
"""The "epoch" whose order gives the Hessian sample: no epoch of a run."""


@dataclass(frozen=True)
class HessianSample:
    """Training images in a fixed order, un-augmented; a smaller sample is a prefix of it."""

    batches: Batches
    indices: NDArray[np.int64]
    """int64 `[samples]`."""

    @property
    def size(self) -> int:
        """Samples available."""
        return len(self.indices)

    def load(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of positions `[start, stop)`."""
        return self.batches.sample(self.indices[start:stop])


def hessian_sample(job: Job, batches: Batches, course: Course, samples: int) -> HessianSample:
    """The first `samples` of the fixed order; all there are, where those are fewer."""
    indices = order.permutation(job.seed, HESSIAN_ORDER, course.samples)
    return HessianSample(batches, indices[:samples])


def open_data(job: Job, run: RunDir, comm: Communicator) -> PackedDataset:
    """The packed data set, packed by rank 0 first where it is absent (a collective)."""
    packed = packed_path(job, run)
    if any(comm.allgather_object(not packed.exists())):
        raise_on_all_ranks(comm, lambda: _open(job, packed) if comm.rank == 0 else None)
    return raise_on_all_ranks(comm, lambda: _open(job, packed))


def build_batches(
    job: Job, dataset: PackedDataset, course: Course, device: torch.device
) -> Batches:
    """What a rank reads of the data set, augmented as the job says."""
    return Batches(
        dataset,
        course,
        job.seed,
        padding=_padding(job, dataset),
        flip=job.data.name != "digits" if job.data.flip is None else job.data.flip,
        device=device,
        channels_last=job.train.channels_last,
    )


def threads_per_rank(job: Job, local_size: int) -> int:
    """CPU threads of this rank: the job's, or the host's cores divided among its ranks.

    A reproducible job takes one, because the order of a kernel's own sums depends on it.
    """
    if job.train.threads_per_rank:
        return job.train.threads_per_rank
    return 1 if job.train.reproducible else max(1, len(os.sched_getaffinity(0)) // local_size)


def packed_path(job: Job, run: RunDir) -> Path:
    """Where the packed form of the job's data lies: the root itself, beside it, or in the run."""
    root = Path(job.data.root).expanduser()
    if root.suffix == ".h5":
        return root
    if job.data.root and os.access(packed_beside(root).parent, os.W_OK):
        return packed_beside(root)
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


def device_of(job: Job, comm: Communicator) -> torch.device:
    """This rank's device: its own GPU where the job wants one and the host has one a rank."""
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


def build_model_and_loss(
    job: Job, dataset: PackedDataset, device: torch.device
) -> tuple[nn.Module, Loss]:
    """Fresh weights, a function of the job's seed alone."""
    torch.manual_seed(job.seed)
    model = build_model(
        job.model.name,
        job.model.arguments,
        dataset.channels,
        dataset.image_size,
        len(dataset.classes),
    )
    layout = torch.channels_last if job.train.channels_last else torch.preserve_format
    smoothing = job.train.label_smoothing
    return (
        model.to(device, memory_format=layout),  # type: ignore[call-overload]
        build_loss(job.train.loss, {"label_smoothing": smoothing} if smoothing else {}),
    )
