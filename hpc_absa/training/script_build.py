"""Building the run of a user's script, with the state of its newest good checkpoint."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hpc_absa.checkpoint import CheckpointManager
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.config import Job
from hpc_absa.curvature.check import check_curvature
from hpc_absa.curvature.estimate import Estimate
from hpc_absa.curvature.loss import Loss
from hpc_absa.data.datasets import MapDataset
from hpc_absa.errors import MisuseError
from hpc_absa.plan import stream_of
from hpc_absa.plugins import user_code
from hpc_absa.progress import Position, Progress
from hpc_absa.schedules import build as build_rule
from hpc_absa.training import run as core
from hpc_absa.training.batches import ScriptLoader, open_dataset
from hpc_absa.training.data import Draw, HessianSample, hessian_samples, require_equal_data
from hpc_absa.training.equal_ranks import broadcast_model, require_equal
from hpc_absa.training.estimator import make_estimator
from hpc_absa.training.log import EventLogger
from hpc_absa.training.rank import Session, redirect_output, supervised, write_job
from hpc_absa.training.resume import resume
from hpc_absa.training.script_job import Arguments, rank_limit, require_equal_arguments
from hpc_absa.training.script_step import ScriptOptimizer
from hpc_absa.training.setup import build_engine, build_run, make_reproducible, threads_per_rank
from hpc_absa.training.state import TrainState


class ScriptHessian:
    """The curvature of a script's model, for schedules that need it."""

    def __init__(
        self,
        job: Job,
        state: TrainState,
        loss: Loss | None,
        comm: Communicator,
        sample_of: Callable[[Draw], HessianSample] | None,
        optimizer: ScriptOptimizer,
    ) -> None:
        """`loss` and `sample_of` are None where the script did not give what they need."""
        self._job, self._state, self._loss, self._comm = job, state, loss, comm
        self._sample_of, self._optimizer = sample_of, optimizer

    def estimate(self, *arguments: Any) -> Estimate:
        """An `Estimator` of a run."""
        loss, sample_of = self._require()
        estimator = make_estimator(self._job, self._state, loss, self._comm, sample_of)
        with self._optimizer:  # the sharpness takes a step, and takes it back
            return estimator(*arguments)

    def check(self) -> list[str]:
        """Check it on one microbatch; returns what a user should know.

        Raises:
            UsageError: it cannot be computed, or not from what the run was given.
        """
        loss, sample_of = self._require()
        with user_code("absa.Run: the Hessian of model and loss, which the schedule needs"):
            microbatch = self._job.train.microbatch
            sample = sample_of(Draw(0, 0))
            return check_curvature(self._state.model, loss, sample, microbatch=microbatch)

    def _require(self) -> tuple[Loss, Callable[[Draw], HessianSample]]:
        if self._loss is None:
            raise MisuseError(
                f"absa.Run: schedule {self._job.schedule.method!r} estimates an eigenvalue: "
                "expected loss, or a schedule that does not, such as absa.FB or absa.GNS"
            )
        if self._sample_of is None:
            raise MisuseError("absa.Run: expected hessian_batch with samples, or dataset")
        return self._loss, self._sample_of


@dataclass(frozen=True)
class Parts:
    """What a script's `Run` works with."""

    core: core.Run
    loader: ScriptLoader
    optimizer: ScriptOptimizer
    hessian: ScriptHessian
    resumed: bool
    """Whether there was a checkpoint."""


def build(
    job: Job,
    given: Arguments,
    session: Session,
    allow_changed: tuple[str, ...],
    cleanup: ExitStack,
) -> Parts:
    """The parts of the run (a collective); `cleanup` gets what undoes their changes to the model.

    Raises:
        CollectiveError: on all ranks, for a user's error on any rank.
    """
    comm, directory, clock = session.comm, session.directory, session.clock
    with clock("start"):
        require_equal_arguments(job, comm)
        device = next(given.model.parameters()).device
        _configure_torch(job, device, session, cleanup)
        stream = stream_of(job, job.data.arguments["samples"])
        rule = raise_on_all_ranks(comm, lambda: build_rule(job, stream.samples))
        data = raise_on_all_ranks(comm, lambda: _open_data(given))
        digest = f"script-{stream.samples}" if isinstance(data, range) else data.digest
        require_equal_data("absa.Run: dataset", digest, comm)
        loader = raise_on_all_ranks(
            comm,
            lambda: ScriptLoader(
                data, stream, job.seed, job.data.workers, device, given.hessian_batch
            ),
        )
        cleanup.callback(loader.close)
        sample_of = raise_on_all_ranks(comm, lambda: hessian_samples(job, loader, stream))
        state = TrainState(
            given.model,
            given.optimizer,
            Progress(Position(), rule.initial()),
            others=given.states,
            with_groups=True,
            restore_groups="optimizer.groups" not in allow_changed,
        )
        raise_on_all_ranks(comm, state.tensors)
        manager = CheckpointManager(directory.checkpoints, job.checkpoint.keep)
        resumed_from = resume(job, digest, manager, comm, state, stream, allow_changed)
        write_job(job, directory, comm)
        if resumed_from is None:
            broadcast_model(given.model, comm)
        require_equal(state.tensors(), comm)
        if supervised():
            redirect_output(directory, state.progress.phase, comm.rank)
    optimizer = ScriptOptimizer(given.optimizer, job.train.lr, given.scaler)
    cleanup.callback(optimizer.close)
    engine = build_engine(job, given.model, given.optimizer, comm, clock, optimizer.update)
    cleanup.callback(engine.close)
    if given.scaler is not None:
        engine.scale = given.scaler.scale
        engine.unscale = partial(optimizer.unscale, given.model)
        # The first call creates its state, which a rank without a microbatch needs as well.
        given.scaler.scale(torch.zeros((), device=device))
    readable = given.dataset is not None or given.hessian_batch is not None
    samples = sample_of if readable else None
    hessian = ScriptHessian(job, state, given.loss, comm, samples, optimizer)
    run = build_run(
        job,
        directory,
        comm,
        session.stop,
        EventLogger(directory, comm.rank, session.console),
        state,
        rule,
        stream,
        engine,
        hessian.estimate,
        manager,
        data_digest=digest,
        resumed_from=resumed_from,
        rank_limit=rank_limit(comm.size, job.ranks.max),
        environment={"command": shlex.join(sys.orig_argv), "directory": os.getcwd()},
    )
    return Parts(run, loader, optimizer, hessian, resumed_from is not None)


def _configure_torch(job: Job, device: torch.device, session: Session, cleanup: ExitStack) -> None:
    if job.train.threads_per_rank or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_rank(job, session.comm.local_size))
    if device.type == "cuda":
        session.clock.synchronize = torch.cuda.synchronize
    if job.train.reproducible:
        before = torch.are_deterministic_algorithms_enabled()
        cleanup.callback(torch.use_deterministic_algorithms, before)
        make_reproducible(session.comm)


def _open_data(given: Arguments) -> MapDataset | range:
    if given.samples is not None:
        return range(given.samples)
    return open_dataset(given.dataset, given.collate_fn)
