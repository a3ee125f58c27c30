"""Training a quantized network for a few epochs, by the trainer as any other job."""

from __future__ import annotations

import contextlib
import sys
import tomllib
from pathlib import Path
from typing import Any

from torch import nn

from hpc_absa import config
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.config import Job
from hpc_absa.errors import CollectiveError, ExitStatus
from hpc_absa.models.weights import read_weights
from hpc_absa.quantization.stored import REFERENCE, digest_of
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.lock import RunLock
from hpc_absa.training.clock import Clock
from hpc_absa.training.faults import StopRequest
from hpc_absa.training.rank import write_job
from hpc_absa.training.setup import build_trainer

SETTINGS = ("momentum", "weight_decay", "microbatch", "label_smoothing", "loss", "drop_last",
            "threads_per_rank", "device", "channels_last", "reproducible")  # fmt: skip
"""Keys of `[train]` that fine-tuning takes from the job."""


def finetune_job(job: Job, network: Path, ranks: int, epochs: int, lr: float) -> Job:
    """The job that trains the network in a file: a constant batch and learning rate."""
    tables: dict[str, Any] = tomllib.loads(config.dump(job))
    settings = {key: value for key, value in tables["train"].items() if key in SETTINGS}
    batch, digest = job.schedule.base_batch, digest_of(read_weights(network))
    changed = {
        "name": f"{job.name}-quantized",
        "seed": job.seed,
        "data": tables["data"],
        "model": {"name": REFERENCE, "file": str(network.resolve()), "digest": digest},
        "loss": tables.get("loss", {}),
        "train": {**settings, "epochs": epochs, "lr": lr},
        "schedule": {"method": "bl", "base_batch": batch, "max_batch": batch},
        "ranks": {"initial": ranks, "max": ranks},
    }
    return config.from_tables(changed, f"fine-tuning of {network}")


def finetune(
    job: Job, network: Path, directory: Path, comm: Communicator, epochs: int, lr: float
) -> nn.Module:
    """Train in the run directory `directory`, or continue there; the model (a collective).

    Args:
        job: that the float network was trained by.
        network: file of the quantized network (`quantization.stored`).
        directory: a run directory as any other, with checkpoints and a log.
        comm: communicator.
        epochs: how many.
        lr: constant learning rate.

    Raises:
        CollectiveError: on all ranks, for a user's error on any rank, or when asked to stop.
    """
    tuning = raise_on_all_ranks(comm, lambda: finetune_job(job, network, comm.size, epochs, lr))
    run = RunDir(directory)
    lock = RunLock(run)

    def prepare() -> None:
        if comm.rank == 0:
            run.create()
            lock.acquire()
            run.stop_request.unlink(missing_ok=True)

    raise_on_all_ranks(comm, prepare)
    stop = StopRequest(comm, run.stop_request)
    try:
        output = directory / "logs" / f"finetune-rank-{comm.rank}.log"
        with output.open("a") as file, contextlib.redirect_stdout(file):
            trainer = build_trainer(tuning, run, comm, Clock(), stop, sys.stderr, ())
            write_job(tuning, run, comm)
            outcome = trainer.train()
        if outcome.kind == "stopped":
            raise CollectiveError(
                f"{directory}: stopped, everything saved; the same command continues",
                ExitStatus.STOPPED,
            )
        return trainer.model
    finally:
        stop.close()
        lock.release()
