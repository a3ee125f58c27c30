"""A job's data set, the loader of it, and the sample that the Hessian is averaged over."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hpc_absa import plugins
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.config import Job
from hpc_absa.curvature.stratified import CANDIDATES
from hpc_absa.data import order, sources
from hpc_absa.data.arrays import PackedReader
from hpc_absa.data.checking import on_rank_0
from hpc_absa.data.datasets import MapDataset, MapReader
from hpc_absa.data.encoded_packing import EncodedSource
from hpc_absa.data.loader import Batch, Loader, Reader
from hpc_absa.data.packed import PackedDataset, open_packed
from hpc_absa.data.prepare import pack_source, packed_beside, prepare
from hpc_absa.data.registry import augmented_by_default
from hpc_absa.data.subset import subset
from hpc_absa.errors import CollectiveError, ExitStatus, HpcAbsaError, UsageError
from hpc_absa.progress import SampleStream
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.paths import packed_name

DataSet = PackedDataset | MapDataset

HESSIAN_ORDER = 2**32 - 1
"""The "epoch" whose order gives the Hessian sample: no epoch of a run."""


@dataclass(frozen=True)
class Draw:
    """Which samples an estimate is made on; those of one boundary are disjoint."""

    boundary: int
    """Index of the boundary."""
    repeat: int
    """Estimates at this boundary before it."""


@dataclass(frozen=True)
class HessianSample:
    """Training samples in a fixed order, without augmentation; a smaller sample is a prefix."""

    loader: Loader
    indices: NDArray[np.int64]
    """[size], into the training set."""
    loaded: dict[tuple[int, int], Batch] | None = None
    """What was read, where reading it again takes long."""
    candidates: HessianSample | None = None
    """More samples, these included, that a stratified sample is chosen from."""

    @property
    def size(self) -> int:
        return len(self.indices)

    @property
    def whole(self) -> bool:
        """Whether it is the training set: then there is no sampling error."""
        return self.size == len(self.loader.dataset.train)

    @property
    def population(self) -> float:
        """Training samples."""
        return len(self.loader.dataset.train)

    def chosen(self, indices: Tensor) -> HessianSample:
        """Those at these positions [n]."""
        return HessianSample(self.loader, self.indices[indices.numpy()], _cache(self.loader))

    def load(self, start: int, stop: int) -> Batch:
        """Inputs and targets of positions `[start, stop)`."""
        if self.loaded is None:
            return self.loader.sample(self.indices[start:stop])
        if (start, stop) not in self.loaded:
            self.loaded[start, stop] = self.loader.sample(self.indices[start:stop])
        return self.loaded[start, stop]


def hessian_sample(job: Job, loader: Loader, stream: SampleStream, samples: int) -> HessianSample:
    """The first `samples` of the fixed order, or all if there are fewer."""
    indices = order.permutation(job.seed, HESSIAN_ORDER, stream.samples)
    return HessianSample(loader, indices[:samples], _cache(loader))


def _cache(loader: Loader) -> dict[tuple[int, int], Batch] | None:
    return None if isinstance(loader.dataset, PackedDataset) else {}


def hessian_samples(
    job: Job, loader: Loader, stream: SampleStream
) -> Callable[[Draw], HessianSample]:
    """The samples of each estimate, with candidates: disjoint ones for repeats at a boundary.

    Raises:
        UsageError: the training set has too few samples for `schedule.max_estimates`.
    """
    size, repeats = job.hessian.samples, getattr(job.schedule, "max_estimates", 1)
    if repeats > 1 and repeats * size > stream.samples:
        raise UsageError(
            f"schedule.max_estimates = {repeats}: expected at most {stream.samples // size} "
            f"disjoint samples of hessian.samples = {size} among {stream.samples} training samples"
        )
    count = min(CANDIDATES * size, stream.samples // repeats)

    def sample(draw: Draw) -> HessianSample:
        epoch = HESSIAN_ORDER + (1 + draw.boundary if job.hessian.fresh else 0)
        indices = order.permutation(job.seed, epoch, stream.samples)[draw.repeat * count :][:count]
        candidates = HessianSample(loader, indices)
        return HessianSample(loader, indices[:size], _cache(loader), candidates)

    fixed = sample(Draw(0, 0))
    return sample if repeats > 1 or job.hessian.fresh else lambda draw: fixed


def open_data(job: Job, directory: RunDir, comm: Communicator) -> DataSet:
    """The data set (a collective); arrays are packed first if no packed file exists."""
    if job.data.name == "script":
        raise CollectiveError(
            f"{directory.path}: the run of a script, which alone has its model and data; evaluate "
            "them there, with hpc_absa.load_checkpoint, top_eigenvalue and spectrum",
            ExitStatus.USAGE,
        )
    packed = packed_path(job, directory)
    if any(comm.allgather_object(not packed.exists())):
        first = on_rank_0(comm, lambda: _load(job, packed, comm))
        if comm.broadcast_object(isinstance(first, MapDataset)):
            mapped = raise_on_all_ranks(comm, lambda: first or _load(job, packed))
            raise_on_all_ranks(comm, lambda: _require_samples(job, mapped))
            require_equal_data(f"data.name = {job.data.name!r}", mapped.digest, comm)
            return mapped
    dataset = raise_on_all_ranks(comm, lambda: _open(job, packed))
    content = f"{dataset.digest} {list(dataset.mean)} {list(dataset.std)}"
    require_equal_data(f"data.name = {job.data.name!r}", content, comm)
    return dataset


def _load(job: Job, packed: Path, comm: Communicator | None = None) -> DataSet:
    """What the job names; arrays are packed into the file `packed`, or it is opened."""
    if packed.exists() or not plugins.is_reference(job.data.name):
        return _open(job, packed, comm)
    arguments = job.data.arguments
    source = sources.load(job.data.name, _root(job), arguments)
    if not isinstance(source, sources.Source | EncodedSource):
        return MapDataset(job.data.name, source)
    packed.parent.mkdir(parents=True, exist_ok=True)
    with plugins.user_code(f"data.name = {job.data.name!r}"):
        return pack_source(source, job.data.name, arguments, packed, comm=comm)


def require_equal_data(origin: str, digest: str, comm: Communicator) -> None:
    """Refuse data that depend on the rank (a collective); `origin` names them in the error.

    Raises:
        CollectiveError: on all ranks.
    """
    digests = comm.allgather_object(digest)
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise CollectiveError(
                f"{origin}: its samples differ between rank 0 and rank "
                f"{rank}; expected the same data on all ranks",
                ExitStatus.USAGE,
            )


def _require_samples(job: Job, dataset: DataSet) -> None:
    if len(dataset.train) < job.train.microbatch:
        raise UsageError(
            f"train.microbatch = {job.train.microbatch}: expected at most the "
            f"{len(dataset.train)} training samples of {job.data.name}"
        )


def _root(job: Job) -> Path | None:
    return Path(os.path.expanduser(job.data.root)) if job.data.root else None


def packed_path(job: Job, directory: RunDir) -> Path:
    """Where the packed form of the job's data is: the root itself, beside it, or in the run."""
    root = Path(os.path.expanduser(job.data.root))
    if root.suffix == ".h5":
        return root
    own = directory.data / packed_name(job.data.name)
    if not job.data.root:
        return own
    beside = packed_beside(root)
    if os.access(beside.parent, os.W_OK) or (not own.exists() and _holds(beside, job)):
        return beside
    return own


def _holds(packed: Path, job: Job) -> bool:
    """Whether a file is the packed form of the job's data."""
    try:
        dataset = open_packed(packed)
    except (HpcAbsaError, OSError):
        return False
    return (dataset.name, dataset.arguments) == (job.data.name, job.data.arguments)


def _open(job: Job, packed: Path, comm: Communicator | None = None) -> PackedDataset:
    if not packed.exists():
        if job.data.root.endswith(".h5"):
            raise UsageError(f"data.root = {job.data.root!r}: no such file")
        packed.parent.mkdir(parents=True, exist_ok=True)
    own = plugins.is_reference(job.data.name)
    with plugins.user_code(f"data.name = {job.data.name!r}") if own else nullcontext():
        dataset = prepare(job.data.name, _root(job), job.data.arguments, packed, comm)
    if job.data.train_samples:
        dataset = subset(dataset, "train", job.data.train_samples)
    if job.data.test_samples:
        dataset = subset(dataset, "test", job.data.test_samples)
    _require_samples(job, dataset)
    return dataset


def evaluation_batch(job: Job, dataset: DataSet) -> int:
    """Test samples of one forward pass."""
    return 256 if isinstance(dataset, PackedDataset) else job.train.microbatch


def build_loader(job: Job, dataset: DataSet, stream: SampleStream, device: torch.device) -> Loader:
    """The loader, with the augmentation that the job or the data set's defaults choose."""
    return Loader(dataset, build_reader(job, dataset, device), stream, job.seed)


def build_reader(job: Job, dataset: DataSet, device: torch.device) -> Reader:
    """What reads batches of `dataset`.

    Raises:
        UsageError: a key of `[data]` that does not apply to it.
    """
    if isinstance(dataset, MapDataset):
        for key in ("padding", "flip"):
            if getattr(job.data, key):
                raise UsageError(
                    f"data.{key} = {getattr(job.data, key)!r}: expected none, because "
                    f"{job.data.name} returned a torch data set, which augments its own samples"
                )
        changed = {"train_samples": None, "test_samples": None, "normalize": True}
        for key in [k for k, usual in changed.items() if getattr(job.data, k) != usual]:
            raise UsageError(
                f"data.{key} = {getattr(job.data, key)!r}: expected none, because {job.data.name} "
                "returned a torch data set, whose samples are used as they are"
            )
        return MapReader(
            dataset,
            job.seed,
            workers=job.data.workers,
            device=device,
            channels_last=job.train.channels_last,
            input_range=job.data.input_range,
        )
    if dataset.is_image and job.data.input_range:
        raise UsageError(
            f"data.input_range = {list(job.data.input_range)}: expected none for images, whose "
            "pixels are from 0 to 1"
        )
    if dataset.is_encoded and job.data.padding is not None:
        raise UsageError(
            f"data.padding = {job.data.padding}: expected none with encoded = true, whose images "
            "have random resized crops"
        )
    augmented = augmented_by_default(job.data.name)
    padding, flip = job.data.padding, job.data.flip
    if padding is None:
        padding = dataset.image_size // 8 if augmented else 0
    return PackedReader(
        dataset,
        job.seed,
        padding=padding,
        flip=augmented if flip is None else flip,
        device=device,
        channels_last=job.train.channels_last,
        input_range=job.data.input_range,
        normalize=job.data.normalize,
    )
