"""A script's training set: its batches as the script's own collate function makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from hpc_absa.data.datasets import Datasets, MapDataset, MapReader, as_datasets
from hpc_absa.data.loader import Batch, Indices, Loader, Part
from hpc_absa.errors import MisuseError, UsageError
from hpc_absa.progress import SampleStream

NAME = "script"
"""Of the data, in the job and in messages."""

Collate = Callable[[list[Any]], Any]


def open_dataset(dataset: Any, collate_fn: Collate | None) -> MapDataset:
    """A map-style data set, whose batches are what `collate_fn` returns.

    Raises:
        UsageError: it is of another kind, or its samples cannot be read or collated.
    """
    datasets = as_datasets(Datasets(dataset, collate_fn=collate_fn, whole=True))
    assert datasets is not None
    return MapDataset(NAME, datasets, "absa.Run: dataset")


class ScriptLoader(Loader):
    """The loader of a script's data; of a `range` it only knows the order."""

    def __init__(
        self,
        dataset: MapDataset | range,
        stream: SampleStream,
        seed: int,
        workers: int,
        device: torch.device,
        hessian_batch: Callable[[list[int]], Any] | None,
    ) -> None:
        """`hessian_batch` gives (inputs, targets) of samples by their indices."""
        if isinstance(dataset, range):
            super().__init__(Datasets(dataset), _NoReader(), stream, seed)
        else:
            reader = MapReader(dataset, seed, workers=workers, device=device)
            super().__init__(dataset, reader, stream, seed)
        self._device, self._hessian_batch = device, hessian_batch

    def batch(self, k: int, then: Callable[[int], list[int]]) -> Any:
        """Microbatch `k`, as the script's collate function makes it; changes random generators.

        `then` gives at most so many of the microbatches that follow.
        """
        if self.ahead or not isinstance(self.reader, MapReader):
            return self.get(k, then(self.ahead)).inputs
        return self.reader.read_seeding("train", *self.samples(k)).inputs

    def sample(self, indices: Indices, part: Part = "train") -> Batch:
        """
        Raises:
            UsageError: the batch is no pair.
        """
        if self._hessian_batch:
            batch = self._hessian_batch(indices.tolist())
        else:
            batch = super().sample(indices, part).inputs
        if type(batch) not in (tuple, list) or len(batch) != 2:
            raise UsageError(
                f"absa.Run: a batch for the Hessian is a {type(batch).__name__}: expected "
                "(inputs, targets); give hessian_batch, a function of indices that returns them"
            )
        return Batch(*tree_map_only(torch.Tensor, lambda t: t.to(self._device), tuple(batch)))


class _NoReader:
    """Of a script that reads its data itself."""

    ahead = 0

    def close(self) -> None:
        pass

    def read(self, *arguments: Any) -> Any:
        raise MisuseError("step.batches: expected a run with dataset; use step.microbatches")

    submit = input_range = input_scale = read
