"""Processes that read batches beside training, one batch at a time each."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing
from torch.utils._pytree import tree_leaves

from hpc_absa import plugins
from hpc_absa.data.loader import Batch, Indices, Part

if TYPE_CHECKING:
    from hpc_absa.data.datasets import MapDataset

SHARED_TENSORS = 16
"""A batch with more tensors than this returns as bytes: each shared one keeps a file open."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""They ask a rank to stop, and may be sent to all processes of a job or of a terminal."""

_mine: tuple[Any, int]
"""In a worker: the data sets and the seed."""


class Workers:
    """Worker processes of one rank.

    They are forked by a separate server process, because a process with MPI must not fork.
    A worker ends with its rank, also when that is killed.
    """

    def __init__(self, count: int, dataset: MapDataset, seed: int) -> None:
        """
        Args:
            count: of processes, which start with the first batches.
            dataset: is sent to each of them.
            seed: of the job.

        Raises:
            UsageError: the data set cannot be sent to a process.
        """
        context = torch.multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hpc_absa.data.datasets"])
        hint = "define what it consists of at the top level of a module, or use no workers"
        with plugins.user_code(f"{dataset.origin}: sending it to {count} worker processes", hint):
            # not by torch's own pickler, which sends an open file for every tensor
            data = pickle.dumps(dataset.datasets, protocol=5)
        _start_server()
        self._pool = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(data, seed))

    def submit(self, part: Part, samples: Indices, epochs: Indices | None) -> Future[Batch | bytes]:
        """The batch, or what `pickle` made of it."""
        return self._pool.submit(_read, part, samples, epochs)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


def _start_server() -> None:
    """Start the server with the signals blocked; the workers inherit that.

    A server that ends takes the pool with it, and the rank could not finish its step and save.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()  # which unblocks some of them
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(data: bytes, seed: int) -> None:
    global _mine
    _mine = (pickle.loads(data), seed)
    torch.set_num_threads(1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # the rank decides what a signal means
    parent = multiprocessing.parent_process()
    assert parent
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _read(part: Part, samples: Indices, epochs: Indices | None) -> Batch | bytes:
    from hpc_absa.data.datasets import collated

    datasets, seed = _mine
    batch = collated(datasets, part, samples, seed, epochs)
    shared = sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(tuple(batch)))
    return batch if shared <= SHARED_TENSORS else pickle.dumps(batch, protocol=5)
