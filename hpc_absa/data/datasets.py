"""Data of any kind: map-style `torch.utils.data.Dataset`s, read sample by sample.

Samples are tensors, dictionaries, tuples, text; a collate function makes a batch of them. What a
sample becomes is a function of the job's seed, the epoch and its index: before each one, the global
random generators of `random`, numpy and torch are seeded with these, in this process or in a worker
process. `docs/data.md` describes it for users.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import TensorDataset, default_collate

from hpc_absa import plugins
from hpc_absa.data.loader import Batch, Indices, Part
from hpc_absa.data.order import sample_seed, sample_seeds
from hpc_absa.data.seeding import preserved_generators, seed_generators
from hpc_absa.data.workers import Workers
from hpc_absa.errors import UsageError

NO_EPOCH = 2**32 - 1
"""In place of the epoch, for the test set and for samples of the Hessian."""

WITHOUT_RANDOMNESS = (list, tuple, TensorDataset)
"""Reading a sample of these runs no code of the user's, and to seed takes 20 µs a sample."""

FINGERPRINTED = 16
"""Samples of each part that the digest covers, besides the lengths."""


@dataclass(frozen=True)
class Datasets:
    """What a data function returns, if training and test set alone do not say it all."""

    train: Any
    """A map-style data set: `len(train)` and `train[index]`."""
    test: Any = None
    """Likewise; None: nothing is evaluated."""
    collate_fn: Callable[[list[Any]], Any] | None = None
    """Makes a batch of a list of samples; None: torch's `default_collate`. A batch of two parts
    is inputs and targets; anything else is the inputs, and the targets are None."""
    classes: Sequence[str] | int | None = None
    """Names of the classes or their number, which a model's builder may take."""
    input_range: tuple[float, float] | None = None
    """Smallest and largest valid input, for adversarial examples."""
    whole: bool = False
    """Whether a batch is all inputs, also one of two parts."""


def as_datasets(value: Any) -> Datasets | None:
    """What a data function returned as `Datasets`; None if it is no data set of this kind.

    Raises:
        UsageError: a data set without an index or a length.
    """
    if isinstance(value, tuple) and len(value) == 2 and all(map(_is_dataset, value)):
        value = Datasets(*value)
    elif _is_dataset(value):
        value = Datasets(value)
    if not isinstance(value, Datasets):
        return None
    for part in ("train", "test"):
        dataset = getattr(value, part)
        if part == "test" and dataset is None:
            continue
        require_map_style(dataset, f"the {part} set")
        if len(dataset) == 0:
            raise UsageError(f"the {part} set is empty, expected at least one sample")
    return value


def _is_dataset(value: Any) -> bool:
    return isinstance(value, torch.utils.data.Dataset) or (
        _is_map_style(value)
        and not isinstance(value, str | bytes | list | tuple | Mapping | np.ndarray | torch.Tensor)
    )


def _is_map_style(value: Any) -> bool:
    return hasattr(value, "__getitem__") and hasattr(value, "__len__")


class MapDataset:
    """An opened data set of this kind, with what the parts of a run need to know of it."""

    is_image = False

    def __init__(self, name: str, datasets: Datasets, origin: str = "") -> None:
        """Reads a few samples.

        Args:
            name: as in the job.
            datasets: training and test set.
            origin: begins messages; by default the key and the name.

        Raises:
            UsageError: a sample cannot be read or collated, or differs when it is read again.
        """
        self.name, self.datasets = name, datasets
        self.origin = origin or f"data.name = {name!r}"
        self.train, self.test = datasets.train, datasets.test
        classes = datasets.classes
        names = map(str, range(classes)) if isinstance(classes, int) else classes or ()
        self.classes = tuple(names)
        with plugins.user_code(
            f"{self.origin}: reading and collating samples",
            "samples of different sizes need a collate_fn (hpc_absa.Datasets)",
        ):
            self.digest = _digest(datasets)
            if self.digest != _digest(datasets):
                raise UsageError(
                    f"{self.origin}: its samples differ when they are read again; expected "
                    "randomness from the global generators of random, numpy and torch only, which "
                    "are seeded for each sample"
                )
            with preserved_generators():
                self.example = collated(datasets, "train", np.arange(1), 0)

    @property
    def offered(self) -> dict[str, int]:
        """What a model's builder may take."""
        inputs = self.example.inputs
        shape: tuple[int, ...] = inputs.shape[1:] if isinstance(inputs, torch.Tensor) else ()
        offered = {"channels": shape[0]} if len(shape) else {}
        offered |= {"image_size": shape[1]} if len(shape) > 1 else {}
        return offered | ({"classes": len(self.classes)} if self.classes else {})


def collated(
    datasets: Datasets, part: Part, samples: Indices, seed: int, epochs: Indices | None = None
) -> Batch:
    """A batch on the CPU; changes the global random generators."""
    dataset, collate = getattr(datasets, part), datasets.collate_fn or default_collate
    batch: Any
    if type(dataset) is TensorDataset and collate is default_collate:
        rows = torch.from_numpy(samples)
        batch = [tensor[rows] for tensor in dataset.tensors]
    else:
        if epochs is None:
            epochs = np.full(len(samples), NO_EPOCH)
        first = sample_seed(seed, int(epochs[0]), int(samples[0]))
        if type(dataset) in WITHOUT_RANDOMNESS:
            items = [dataset[index] for index in samples.tolist()]
        else:
            seeds, items = sample_seeds(seed, epochs, samples), []
            for index, own in zip(samples.tolist(), seeds.tolist(), strict=True):
                seed_generators(own)
                try:
                    items.append(dataset[index])
                except Exception:
                    with plugins.user_code(f"reading sample {index} of the {part} set"):
                        raise
        seed_generators(first ^ 1)  # a collate function may be random, too
        batch = collate(items)
    if not datasets.whole and type(batch) in (tuple, list) and len(batch) == 2:
        return Batch(_plain(batch[0]), _plain(batch[1]))
    return Batch(_plain(batch), None)


def require_map_style(dataset: Any, title: str) -> None:
    """
    Raises:
        UsageError: the samples cannot be read by their index.
    """
    if isinstance(dataset, torch.utils.data.IterableDataset) or not _is_map_style(dataset):
        raise UsageError(
            f"{title} is a {type(dataset).__name__}, expected a map-style data set with "
            "__getitem__ and __len__, because the order of samples is by their index"
        )


def _plain(value: Any) -> Any:
    """A dictionary for any mapping, as tokenizers return them."""
    return dict(value) if isinstance(value, Mapping) else value


class MapReader:
    """A `Reader` of such data; in worker processes, or in this one between steps."""

    def __init__(
        self,
        dataset: MapDataset,
        seed: int,
        *,
        workers: int,
        device: torch.device,
        channels_last: bool = False,
        input_range: tuple[float, float] | None = None,
    ) -> None:
        """
        Args:
            dataset: training and test set.
            seed: of the job.
            workers: processes that read; each a whole batch at a time.
            device: of the tensors.
            channels_last: memory layout of [b, C, H, W] inputs.
            input_range: in place of the data set's.
        """
        self.dataset = dataset
        self.ahead = 2 * workers
        self._seed, self._device, self._channels_last = seed, device, channels_last
        self._range = input_range or dataset.datasets.input_range or (-torch.inf, torch.inf)
        self._workers = Workers(workers, dataset, seed) if workers else None

    def read(self, part: Part, samples: Indices, epochs: Indices | None = None) -> Batch:
        with preserved_generators():
            batch = collated(self.dataset.datasets, part, samples, self._seed, epochs)
        return self._on_device(batch)

    def read_seeding(self, part: Part, samples: Indices, epochs: Indices) -> Batch:
        """As `read`, but it leaves the global random generators changed, which is faster."""
        return self._on_device(collated(self.dataset.datasets, part, samples, self._seed, epochs))

    def submit(self, part: Part, samples: Indices, epochs: Indices | None = None) -> _Pending:
        assert self._workers
        return _Pending(self, self._workers.submit(part, samples, epochs))

    def close(self) -> None:
        if self._workers:
            self._workers.close()

    def input_range(self) -> tuple[torch.Tensor, torch.Tensor]:
        low, high = torch.tensor(self._range, device=self._device)
        return low, high

    def input_scale(self) -> torch.Tensor:
        return torch.ones((), device=self._device)

    def _on_device(self, batch: Batch) -> Batch:
        if self._device.type == "cpu" and not self._channels_last:
            return batch
        return Batch(*tree_map_only(torch.Tensor, self._tensor_on_device, tuple(batch)))

    def _tensor_on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            pinned = tensor.pin_memory() if tensor.device.type == "cpu" else tensor
            tensor = pinned.to(self._device, non_blocking=True)
        if self._channels_last and tensor.dim() == 4 and tensor.is_floating_point():
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor


@dataclass(frozen=True)
class _Pending:
    reader: MapReader
    future: Any

    def result(self) -> Batch:
        origin = self.reader.dataset.origin
        with plugins.user_code(f"{origin}: in a worker process"):
            try:
                batch = self.future.result()
            except BrokenProcessPool:
                raise UsageError(
                    f"{origin}: a worker process ended, see its error above; without one, it may "
                    "have been killed for its memory"
                ) from None
        return self.reader._on_device(pickle.loads(batch) if isinstance(batch, bytes) else batch)

    def cancel(self) -> None:
        self.future.cancel()


# Digest


def _digest(datasets: Datasets) -> str:
    """SHA-256 over the lengths and some samples of each part, at equal distances, as a batch."""
    hasher = hashlib.sha256()
    with preserved_generators():
        parts: tuple[Part, ...] = ("train", "test")
        for part in parts:
            dataset = getattr(datasets, part)
            count = 0 if dataset is None else len(dataset)
            hasher.update(f"{part} {count};".encode())
            if count:
                chosen = np.unique(np.linspace(0, count - 1, FINGERPRINTED).astype(np.int64))
                _hash(hasher, tuple(collated(datasets, part, chosen, 0)))
    return f"samples-{hasher.hexdigest()}"


def _hash(hasher: Any, batch: Any) -> None:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            leaf = leaf.detach().cpu().contiguous()
            hasher.update(f"{leaf.dtype} {list(leaf.shape)};".encode())
            hasher.update(leaf.reshape(-1).view(torch.uint8).numpy().data)
        elif isinstance(leaf, np.ndarray) and leaf.dtype != object:
            hasher.update(f"{leaf.dtype} {list(leaf.shape)};".encode() + leaf.tobytes())
        elif isinstance(leaf, bool | int | float | complex | str | bytes | type(None)):
            hasher.update(f"{leaf!r};".encode())
        else:
            hasher.update(f"{type(leaf).__qualname__};".encode())
