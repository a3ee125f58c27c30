"""Processes that read batches beside training, one batch at a time each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing

from hpc_absa import plugins
from hpc_absa.data.loader import Batch, Indices, Part

if TYPE_CHECKING:
    from hpc_absa.data.datasets import MapDataset

_mine: tuple[Any, int]
"""In a worker: the data sets and the seed."""


class Workers:
    """Worker processes of one rank.

    They are forked by a server that was started anew, because a process with MPI must not fork.
    Tensors come back in shared memory. A worker ends with its rank, also when that is killed.
    """

    def __init__(self, count: int, dataset: MapDataset, seed: int) -> None:
        """
        Args:
            count: of processes, which start with the first batches.
            dataset: is sent to each of them.
            seed: of the job.
        """
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hpc_absa.data.datasets"])
        self._what = f"data.workers = {count}: sending {dataset.name} to worker processes"
        self._pool = ProcessPoolExecutor(
            count, context, initializer=_begin, initargs=(dataset.datasets, seed)
        )

    def submit(self, part: Part, samples: Indices, epochs: Indices | None) -> Future[Batch]:
        """
        Raises:
            UsageError: the data set cannot be sent to a process.
        """
        hint = "define what it consists of at the top level of a module, or set data.workers = 0"
        with plugins.user_code(self._what, hint):
            return self._pool.submit(_read, part, samples, epochs)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _begin(datasets: Any, seed: int) -> None:
    global _mine
    _mine = (datasets, seed)
    torch.set_num_threads(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the rank decides what a signal means
    parent = multiprocessing.parent_process()
    assert parent
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _read(part: Part, samples: Indices, epochs: Indices | None) -> Batch:
    from hpc_absa.data.datasets import collated

    datasets, seed = _mine
    return collated(datasets, part, samples, seed, epochs)
