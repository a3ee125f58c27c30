"""The model, loss and data that a command works on: of a checkpoint, or of foreign weights.

`load(Source(path), comm)` gives every command that inspects a model (spectrum, attack, quantize,
analyse) the same model on every rank.
"""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hpc_absa import config
from hpc_absa.checkpoint import CheckpointManager, Content
from hpc_absa.checkpoint.restore import load as load_checkpoint
from hpc_absa.checkpoint.restore import newest_good
from hpc_absa.comm import Communicator, connect, raise_on_all_ranks
from hpc_absa.config import Job
from hpc_absa.curvature.loss import Loss
from hpc_absa.data.datasets import MapDataset
from hpc_absa.data.loader import Loader, Part
from hpc_absa.errors import CheckpointError, CollectiveError, ExitStatus, HpcAbsaError, UsageError
from hpc_absa.models.weights import read_weights
from hpc_absa.plan import stream_of
from hpc_absa.progress import SampleStream
from hpc_absa.rundir import RunDir
from hpc_absa.training.data import (
    DataSet,
    HessianSample,
    build_loader,
    evaluation_batch,
    hessian_sample,
    open_data,
)
from hpc_absa.training.evaluate import Evaluation, evaluate
from hpc_absa.training.setup import (
    build_metrics,
    build_model_and_loss,
    device_of,
    threads_per_rank,
)
from hpc_absa.training.state import load_model


@dataclass(frozen=True)
class Source:
    """What a user names: a checkpoint, or a job and weights from elsewhere."""

    path: Path
    """A checkpoint, a run directory (its newest good checkpoint), or with `weights` a job file."""
    root: str | None = None
    """Of the data set, in place of the job's `data.root`."""
    weights: Path | None = None
    """A file of weights (`models.weights`) that replaces those of the checkpoint."""
    mean: tuple[float, ...] = ()
    """By which the foreign weights expect inputs to be normalised; the data set's if empty."""
    std: tuple[float, ...] = ()
    overrides: tuple[str, ...] = ()
    """`key=value`, of the job."""


@dataclass(frozen=True)
class Loaded:
    """A model with its loss and data, the same on all ranks."""

    origin: str
    """The file of the weights."""
    job: Job
    model: nn.Module
    """On `device`."""
    loss: Loss
    loader: Loader
    stream: SampleStream
    device: torch.device
    attributes: Mapping[str, Any] = field(default_factory=dict)
    """Root attributes of the checkpoint: `epoch`, `step`, `samples`, ...; empty for weights."""

    @property
    def dataset(self) -> DataSet:
        return self.loader.dataset

    def training_sample(self, samples: int) -> HessianSample:
        """The first `samples` training samples of the order that decisions use, at most all."""
        return hessian_sample(self.job, self.loader, self.stream, samples)

    def test_indices(self, samples: int | None) -> NDArray[np.int64]:
        """`samples` of the test set at equal distances, as it may be sorted by class; or all.

        Raises:
            UsageError: there is no test set.
        """
        if self.dataset.test is None:
            raise UsageError(f"{self.dataset.name}: it has no test set, which is needed here")
        total = len(self.dataset.test)
        count = min(samples or total, total)
        return np.arange(count, dtype=np.int64) * total // count

    def evaluate(
        self, model: nn.Module, comm: Communicator, part: Part, indices: NDArray[np.int64]
    ) -> Evaluation:
        """Loss and metrics of another model of these samples (a collective)."""
        size = evaluation_batch(self.job, self.dataset)
        starts = range(0, len(indices), size)[comm.rank :: comm.size]
        batches = self.loader.batches(part, (indices[start : start + size] for start in starts))
        metrics = build_metrics(self.job, self.dataset, self.loss)
        return evaluate(model, self.loss, metrics, batches, comm)


def load(source: Source, comm: Communicator) -> Loaded:
    """Build the model and data, and load the weights (a collective).

    Raises:
        CollectiveError: on all ranks, for a user's error on any rank.
    """
    origin, job, arrays, attributes = _read(source, comm)
    torch.set_num_threads(threads_per_rank(job, comm.local_size))
    device = raise_on_all_ranks(comm, lambda: device_of(job, comm))
    dataset = open_data(job, _run_dir(source, job), comm)
    dataset = raise_on_all_ranks(comm, lambda: _normalised(dataset, source))
    model, loss = raise_on_all_ranks(comm, lambda: build_model_and_loss(job, dataset, device))

    def fill() -> None:
        given = _with_counters(arrays, model) if source.weights else arrays
        load_model(model, given, origin)
        require_finite(model, origin)

    raise_on_all_ranks(comm, fill)
    stream = stream_of(job, len(dataset.train))
    loader = build_loader(job, dataset, stream, device)
    return Loaded(origin, job, model, loss, loader, stream, device, attributes)


def require_finite(model: nn.Module, origin: str) -> None:
    """Refuse weights that no measurement of the model could mean anything for.

    Raises:
        CheckpointError: names the first tensor with a value that is NaN or infinite.
    """
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            bad = int((~tensor.isfinite()).sum())
            if bad:
                raise CheckpointError(
                    f"{origin}: {name} has {bad} values that are NaN or infinite, expected finite "
                    "weights; choose a checkpoint from before the loss diverged"
                )


def on_ranks(command: Callable[[Communicator], int]) -> int:
    """Run a command on this rank; returns the process's exit status.

    An error that all ranks have is printed once. One that this rank alone may have ends all ranks:
    the others wait for it in a collective.
    """
    comm = connect()
    if comm.size > 1:  # KeyboardInterrupt would leave the others waiting for this rank
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        return command(comm)
    except Exception as error:
        if comm.size > 1 and not isinstance(error, CollectiveError):
            _abort(error, comm)
        if not isinstance(error, HpcAbsaError):
            raise
        if comm.rank == 0:
            print(f"hpc-absa: {error}", file=sys.stderr)
        return int(error.status)
    finally:
        comm.close()


def _abort(error: Exception, comm: Communicator) -> None:
    if isinstance(error, HpcAbsaError):
        print(f"hpc-absa: rank {comm.rank}: {error}", file=sys.stderr, flush=True)
        comm.abort(error.status)
    traceback.print_exception(error)
    comm.abort(ExitStatus.FAILED)


def _read(
    source: Source, comm: Communicator
) -> tuple[str, Job, Mapping[str, NDArray[Any]], Mapping[str, Any]]:
    """Origin, job, arrays by name, and attributes."""
    overrides = source.overrides
    if source.root:
        overrides = (*overrides, f"data.root={json.dumps(source.root)}")
    path = source.path
    if path.suffix == ".toml":
        if source.weights is None:
            raise_on_all_ranks(comm, lambda: _refuse_job(path))
        job = raise_on_all_ranks(comm, lambda: config.load(path, overrides))
        attributes: Mapping[str, Any] = {}
    else:
        path, content = read_checkpoint(path, comm)
        text = str(content.groups["job"].attributes["text"])
        job = raise_on_all_ranks(comm, lambda: config.parse(text, str(path), overrides, warn=False))
        if source.weights is None:
            return str(path), job, content.groups["model"].arrays, content.attributes
        attributes = {}
    weights = source.weights
    assert weights is not None
    return str(weights), job, raise_on_all_ranks(comm, lambda: read_weights(weights)), attributes


def read_checkpoint(path: Path, comm: Communicator) -> tuple[Path, Content]:
    """A checkpoint, or the newest good one of a run directory, and its content (a collective)."""
    if not path.is_dir():
        return path, load_checkpoint(path, comm)
    newest = newest_good(CheckpointManager(RunDir(path).checkpoints, keep=1), comm)
    if newest is None:
        raise_on_all_ranks(comm, lambda: _refuse_folder(path))
    assert newest is not None
    return newest.path, newest.content


def _refuse_job(path: Path) -> None:
    raise UsageError(f"{path}: a job file has no weights; give a checkpoint, or --weights FILE")


def _refuse_folder(path: Path) -> None:
    raise UsageError(f"{path}: no checkpoint in this folder; expected a run directory or a file")


def _run_dir(source: Source, job: Job) -> RunDir:
    """Where the packed data is, if it cannot be beside the original."""
    if source.path.suffix == ".toml":
        return RunDir(Path("runs") / job.name)
    if source.path.is_dir():
        return RunDir(source.path)
    return RunDir(source.path.resolve().parent.parent)


def _normalised(dataset: DataSet, source: Source) -> DataSet:
    """With the mean and standard deviation that foreign weights expect."""
    if not (source.mean or source.std):
        return dataset
    if isinstance(dataset, MapDataset):
        raise UsageError(f"--mean, --std: {dataset.name} is read as it is; normalise it there")
    for name, given in (("--mean", source.mean), ("--std", source.std)):
        if given and len(given) != dataset.channels:
            raise UsageError(
                f"{name}: {len(given)} numbers, expected {dataset.channels}, one per channel"
            )
    if source.std and min(source.std) <= 0:
        raise UsageError(f"--std: {min(source.std):g}, expected positive numbers")
    return replace(
        dataset,
        mean=np.array(source.mean) if source.mean else dataset.mean,
        std=np.array(source.std) if source.std else dataset.std,
    )


def _with_counters(arrays: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """With batch norm's counters, which many programs do not save and evaluation does not use."""
    state = model.state_dict().items()
    kept = {n: t.cpu().numpy() for n, t in state if n.endswith("num_batches_tracked")}
    return {**kept, **arrays}
