"""`hpc_absa.Run`: everything that a run needs, around a training loop of the user's own.

    with absa.Run(model=model, optimizer=optimizer, loss=loss_fn, dataset=train_set, epochs=10,
                  schedule=absa.ABSA(base_batch=64, max_batch=1024), microbatch=16) as run:
        for step in run:
            for inputs, targets in step.batches:
                step.backward(loss_fn(model(inputs), targets))
            step.optimize()

The script owns model, data, loss, optimizer and whatever else it computes. The run owns which
samples come when, the batch size and its factor on the learning rate, the eigenvalue, checkpoints,
stopping, and the continuation with more ranks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from hpc_absa import config
from hpc_absa.allocation import ALLOW_CHANGED
from hpc_absa.checkpoint import CheckpointManager
from hpc_absa.comm import Communicator, connect, raise_on_all_ranks
from hpc_absa.config import Job
from hpc_absa.curvature.check import check_curvature
from hpc_absa.curvature.estimate import Estimate
from hpc_absa.curvature.loss import Loss
from hpc_absa.data.datasets import MapDataset
from hpc_absa.errors import CollectiveError, ExitStatus, MisuseError, UsageError
from hpc_absa.plan import stream_of
from hpc_absa.plugins import user_code
from hpc_absa.progress import Boundary, Position, Progress
from hpc_absa.progress import Step as Microbatches
from hpc_absa.rundir import RunDir
from hpc_absa.schedules import Schedule
from hpc_absa.schedules import build as build_rule
from hpc_absa.training import run as core
from hpc_absa.training.batches import ScriptLoader, open_dataset
from hpc_absa.training.data import hessian_samples, require_equal_data
from hpc_absa.training.estimator import make_estimator
from hpc_absa.training.evaluate import evaluating
from hpc_absa.training.faults import SIGNALS
from hpc_absa.training.log import EventLogger
from hpc_absa.training.rank import Session, duplicate, exit_status, redirect_output, supervised
from hpc_absa.training.resume import resume
from hpc_absa.training.script_job import (
    directory_of,
    job_of,
    require_arguments,
    require_equal_arguments,
)
from hpc_absa.training.script_step import Step
from hpc_absa.training.setup import build_engine, build_run, make_reproducible, threads_per_rank
from hpc_absa.training.state import Stateful, TrainState, broadcast_model, require_equal

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim.lr_scheduler import LRScheduler


class MapStyle(Protocol):
    """A map-style data set: `torch.utils.data.Dataset`, a list, or anything else like them."""

    def __getitem__(self, index: int, /) -> Any: ...
    def __len__(self) -> int: ...


Metrics = Mapping[str, float | Tensor]


class Run:
    """A run of a user's training loop, on the ranks that there are.

    Use it in a `with` statement, on all ranks alike, and iterate over it once. It continues from
    the newest checkpoint in its directory, if there is one. The iteration ends when all epochs are
    visited, and the script goes on. Where the run was asked to stop (SIGTERM, SIGUSR1, Ctrl-C,
    `hpc-absa cancel`), or continues with more ranks, everything is saved and the process exits at
    the end of the iteration, with status 75 or 0.
    """

    rank: int
    """Of this process among all ranks."""
    size: int
    """Number of ranks."""

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        epochs: int,
        microbatch: int,
        loss: Loss | None = None,
        dataset: MapStyle | None = None,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        num_workers: int = 0,
        samples: int | None = None,
        hessian_batch: Callable[[list[int]], Any] | None = None,
        evaluate: Callable[[], float | Metrics | None] | None = None,
        lr_scheduler: LRScheduler | ReduceLROnPlateau | None = None,
        scaler: GradScaler | None = None,
        state: Mapping[str, Stateful] | None = None,
        seed: int = 0,
        reproducible: bool = False,
        drop_last: bool = False,
        train: Mapping[str, Any] | None = None,
        hessian: Mapping[str, Any] | None = None,
        ranks: Mapping[str, Any] | None = None,
        checkpoint: Mapping[str, Any] | None = None,
        allow_changed: Sequence[str] = (),
    ) -> None:
        """
        Args:
            directory: of the run's files; by default what `hpc-absa launch` says, or `runs/SCRIPT`.
            model: on its device. Rank 0's initial weights are those of all ranks.
            optimizer: of parameters of the model. Its learning rates are for the schedule's
                `base_batch`; in each step they are multiplied by the schedule's factor.
            schedule: of the batch size: `absa.ABSA(base_batch=64, max_batch=1024)`.
            epochs: passes over the training set.
            microbatch: samples of one forward and backward pass on one rank.
            loss: `loss(outputs, targets)`, for the Hessian: a mean, or `(sum, denominator)`.
            dataset: map-style training set. `step.batches` are its collated samples, and the
                Hessian's batches are made in the same way; they should be (inputs, targets).
            collate_fn: makes a batch of a list of samples; torch's default by default.
            num_workers: processes that read the data set; 0 reads it in this one.
            samples: size of the training set, where the script reads it itself by the indices in
                `step.microbatches`.
            hessian_batch: gives (inputs, targets) of the samples with these indices; for the
                Hessian, where `dataset` does not give them.
            evaluate: called on all ranks at the end of each epoch, in evaluation mode and without
                gradients; returns the test loss, or metrics by name, of which `loss` and `accuracy`
                are shown as such. Rank 0's result counts.
            lr_scheduler: stepped at the end of each epoch; its state is in the checkpoint. Its
                rates are multiplied by the schedule's factor.
            scaler: of the loss, for float16; its state is in the checkpoint.
            state: by name, further objects with `state_dict` and `load_state_dict`, to be saved and
                restored. They must be equal on all ranks.
            seed: of the order of samples and of the random numbers of each microbatch.
            reproducible: the same bits for any power-of-two number of ranks; costs speed.
            drop_last: leave out the samples of each epoch that do not fill a microbatch.
            train: further keys of a job file's `[train]` table, such as `max_grad_norm`.
            hessian: the keys of its `[hessian]` table, such as `samples`.
            ranks: the keys of its `[ranks]` table, such as `microbatches_per_rank`.
            checkpoint: the keys of its `[checkpoint]` table, such as `every_seconds`.
            allow_changed: what may differ from the run that is continued, such as `train.epochs`.

        Raises:
            UsageError: when entered, one line; with several ranks, rank 0 prints it and all exit.
        """
        self._path = directory
        supervised_keys = os.environ.get(ALLOW_CHANGED, "").split(",")
        self._allow_changed = (*allow_changed, *filter(None, supervised_keys))
        self._model, self._optimizer, self._loss = model, optimizer, loss
        self._dataset, self._collate = dataset, collate_fn
        self._samples, self._hessian_batch = samples, hessian_batch
        self._evaluate, self._lr_scheduler, self._scaler = evaluate, lr_scheduler, scaler
        self._states = dict(state or {})
        if lr_scheduler is not None:
            self._states["lr_scheduler"] = lr_scheduler
        if scaler is not None:
            self._states["scaler"] = scaler
        self._tables: dict[str, Any] = {
            "seed": seed,
            "schedule": schedule,
            "hessian": dict(hessian or {}),
            "ranks": dict(ranks or {}),
            "checkpoint": dict(checkpoint or {}),
            "data": {"workers": num_workers},
            "train": {
                "epochs": epochs,
                "microbatch": microbatch,
                "reproducible": reproducible,
                "drop_last": drop_last,
                **(train or {}),
            },
        }
        self._train_keys = tuple(train or {})
        self._session: Session | None = None
        self._state: Literal["new", "running", "ended"] = "new"
        self._updating = False

    # The context

    def __enter__(self) -> Run:
        if self._session:
            raise MisuseError("absa.Run: a run is entered once; make another one")
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        comm = connect()
        self.rank, self.size, self._comm = comm.rank, comm.size, comm
        console = duplicate(sys.stdout) if supervised() else sys.stdout
        self._cleanup = contextlib.ExitStack()
        try:
            path = raise_on_all_ranks(comm, lambda: directory_of(self._path))
            self._session = Session(comm, RunDir(path), console)
            self._job = self._session.begin(lambda: self._make_job(path), write_job=False)
            self._build(self._session)
        except BaseException as error:
            self._fail(error)
            if isinstance(error, CollectiveError) and error.status == ExitStatus.USAGE:
                raise UsageError(str(error)) from None
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and not (isinstance(error, SystemExit) and self._state == "ended"):
            self._fail(error)
            return
        try:
            if self._state == "running":  # the script left its loop
                self._core.save()
                self._end()
        except SystemExit:
            self._close()
            self._comm.close()
            raise
        except BaseException as raised:
            self._fail(raised)
            raise
        self._close()
        self._comm.close()

    def _fail(self, error: BaseException) -> None:
        """End all ranks, except where there is one, to which the error belongs."""
        session = self._session
        if core_run := vars(self).get("_core"):
            core_run.wait_for_writes()
        if self.size == 1 and not supervised():
            if session:
                session.close()
            self._close()
        elif session:
            if isinstance(error, SystemExit):  # a restart would end in the same way
                error = MisuseError(
                    f"the script exited with status {error.code} within `with absa.Run(...)`: "
                    "leave the loop with break, or stop the run with hpc-absa cancel"
                )
            status = session.fail(error)
            self._close()
            raise SystemExit(status) from None
        else:
            if self.rank == 0:
                print(f"hpc-absa: {error}", file=sys.stderr)
            raise SystemExit(getattr(error, "status", ExitStatus.FAILED)) from None

    def _close(self) -> None:
        self._cleanup.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    # Building

    def _make_job(self, path: os.PathLike[str]) -> Job:
        if (self._dataset is None) == (self._samples is None):
            raise UsageError("absa.Run: expected either dataset or samples")
        require_arguments(self._model, self._optimizer, self._states, self._train_keys)
        samples = self._samples if self._dataset is None else len(self._dataset)
        assert samples is not None
        name = os.path.basename(os.path.abspath(path))
        job = job_of(
            name, self._model, self._optimizer, self._loss, samples, self.size, self._tables
        )
        if samples < job.train.microbatch:
            raise UsageError(
                f"absa.Run: microbatch = {job.train.microbatch}: expected at most the "
                f"{samples} training samples"
            )
        return job

    def _build(self, session: Session) -> None:
        job, comm, directory = self._job, session.comm, session.directory
        with session.clock("start"):
            require_equal_arguments(job, comm)
            self._configure_torch(session)
            stream = stream_of(job, job.data.arguments["samples"])
            rule = raise_on_all_ranks(comm, lambda: build_rule(job, stream.samples))
            data = raise_on_all_ranks(comm, self._open_data)
            digest = f"script-{stream.samples}" if isinstance(data, range) else data.digest
            require_equal_data("absa.Run: dataset", digest, comm)
            self._loader = loader = ScriptLoader(
                data, stream, job.seed, job.data.workers, self._device, self._hessian_batch
            )
            self._cleanup.callback(loader.close)
            self._sample_of = raise_on_all_ranks(comm, lambda: hessian_samples(job, loader, stream))
            self._train_state = state = TrainState(
                self._model,
                self._optimizer,
                Progress(Position(), rule.initial()),
                others=self._states,
                with_groups=True,
                restore_groups="optimizer.groups" not in self._allow_changed,
            )
            raise_on_all_ranks(comm, state.tensors)
            manager = CheckpointManager(directory.checkpoints, job.checkpoint.keep)
            resumed_from = resume(job, digest, manager, comm, state, self._allow_changed)
            if self.rank == 0:
                directory.write_job(config.dump(job))
            self._resumed = resumed_from is not None
            if not self._resumed:
                broadcast_model(self._model, comm)
            require_equal(state.tensors(), comm)
            if supervised():
                redirect_output(directory, state.progress.phase, comm.rank)
        self._log = EventLogger(directory, comm.rank, session.console)
        engine = build_engine(job, self._model, self._optimizer, comm, session.clock, self._update)
        self._cleanup.callback(engine.close)
        if self._scaler is not None:
            engine.scale = self._scaler.scale
        handle = self._optimizer.register_step_pre_hook(self._on_optimizer_step)
        self._cleanup.callback(handle.remove)
        self._core = build_run(
            job,
            directory,
            comm,
            session.stop,
            self._log,
            state,
            rule,
            stream,
            engine,
            self._estimate,
            manager,
            data_digest=digest,
            resumed_from=resumed_from,
        )

    def _configure_torch(self, session: Session) -> None:
        job, comm = self._job, session.comm
        if job.train.threads_per_rank or "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(threads_per_rank(job, comm.local_size))
        self._device = next(self._model.parameters()).device
        if self._device.type == "cuda":
            session.clock.synchronize = torch.cuda.synchronize
        if job.train.reproducible:
            before = torch.are_deterministic_algorithms_enabled()
            self._cleanup.callback(torch.use_deterministic_algorithms, before)
            make_reproducible(comm)

    def _open_data(self) -> MapDataset | range:
        if self._dataset is None:
            return range(self._job.data.arguments["samples"])
        return open_dataset(self._dataset, self._collate)

    def _on_optimizer_step(self, *arguments: Any) -> None:
        if not self._updating:
            raise MisuseError(
                "optimizer.step() was called: expected step.optimize(), which calls it with the "
                "gradients of all ranks"
            )

    # The iteration

    def __iter__(self) -> Iterator[Step]:
        """The optimizer steps that are left.

        Raises:
            UsageError: the body of the loop did not use a step as it must.
        """
        if self._state != "new" or self._session is None:
            raise MisuseError("absa.Run: expected one iteration, within `with absa.Run(...)`")
        self._state = "running"
        run, log = self._core, self._session.directory.log
        done = log.last("done")
        steps = run.state.progress.position.step
        if done and done.get("steps") == steps and not self._allow_changed:
            self._log.print(f"{self._session.directory.path}: already done")
            self._state = "ended"
            self._session.close()
            return
        run.begin_phase()
        if not self._resumed and supervised() and run.end_for_more_ranks():
            run.save()  # the supervisor did not know the script's batch
        elif run.steps_left:
            self._rehearse()
        while (item := run.next()) is not None:
            if isinstance(item, Microbatches):
                yield from self._take(item)
                continue
            if run.needs_evaluation(item):
                self._end_epoch(item)
            estimate = run.estimate_eigenvalue(item)
            if run.stopped:
                continue
            decision = run.decide(item, estimate)
            if cut := run.cut_step(item, decision):
                yield from self._take(cut)
            run.apply(item, decision, estimate)
        self._end()

    def _take(self, item: Microbatches) -> Iterator[Step]:
        step = Step(self._core, self._loader, item, self._job.train.lr, self._unscale)
        with self._core.clock("comp"):
            yield step
            if step.result is None:
                raise MisuseError("a step ended without step.optimize()")

    def _end(self) -> None:
        """End the phase; the process exits unless the run is done."""
        assert self._session is not None
        outcome = self._session.end(self._core.end())
        self._state = "ended"
        if outcome.kind == "done":
            return
        status = ExitStatus.STOPPED if outcome.kind == "stopped" else ExitStatus.OK
        if self.rank == 0 and not supervised():
            self._log.print("stopped, everything saved; run the same command to continue")
        raise SystemExit(exit_status(status))

    def _unscale(self) -> None:
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)

    def _update(self, lr: float) -> None:
        """Step the optimizer; the groups have rates of their own, also between the steps."""
        groups = self._optimizer.param_groups
        rates = [group["lr"] for group in groups]
        factor = lr / self._job.train.lr
        self._updating = True
        try:
            if factor != 1:
                for group in groups:
                    group["lr"] = group["lr"] * factor
            if self._scaler is None:
                self._optimizer.step()
            else:
                self._scaler.step(self._optimizer)
                self._scaler.update()
        finally:
            self._updating = False
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate

    # Boundaries

    def _end_epoch(self, boundary: Boundary) -> None:
        metrics = self._measured()
        loss = metrics.pop("loss", None)
        self._core.record_epoch(boundary, loss, metrics.get("accuracy"), metrics)
        if isinstance(self._lr_scheduler, ReduceLROnPlateau):
            if loss is None:
                raise MisuseError("absa.Run: ReduceLROnPlateau needs the loss from evaluate")
            self._lr_scheduler.step(loss)
        elif self._lr_scheduler is not None:
            self._lr_scheduler.step()

    def _measured(self) -> dict[str, float]:
        """Rank 0's result of the user's function."""
        if self._evaluate is None:
            return {}
        assert self._session is not None
        with self._core.clock("eval"), self._session.stop.saving(), evaluating(self._model):
            result = self._evaluate()
        if result is None:
            metrics = {}
        elif isinstance(result, Mapping):
            metrics = {str(name): float(value) for name, value in result.items()}
        else:
            metrics = {"loss": float(result)}
        return self._comm.broadcast_object(metrics)

    def _require_hessian(self) -> Loss:
        """The loss of the Hessian.

        Raises:
            UsageError: it cannot be computed from what the run was given.
        """
        if self._loss is None:
            raise UsageError(
                f"absa.Run: schedule {self._job.schedule.method!r} estimates an eigenvalue: "
                "expected loss, or a schedule that does not, such as absa.FB or absa.GNS"
            )
        if self._hessian_batch is None and self._dataset is None:
            raise UsageError("absa.Run: expected hessian_batch with samples, or dataset")
        return self._loss

    def _estimate(self, *arguments: Any) -> Estimate:
        estimator = make_estimator(
            self._job, self._train_state, self._require_hessian(), self._comm, self._sample_of
        )
        self._updating = True  # the sharpness takes the optimizer's step, and takes it back
        try:
            return estimator(*arguments)
        finally:
            self._updating = False

    def _rehearse(self) -> None:
        """Require that the Hessian can be computed, before the first step."""
        schedule = self._core.state.progress.schedule
        if self._scaler is not None and self._core.rule.wants_gradients(schedule):
            raise MisuseError(
                "absa.Run: scaler: expected none with a schedule that measures gradients"
            )
        if not self._core.rule.wants_eigenvalue(schedule):
            return

        def check() -> None:
            loss, microbatch = self._require_hessian(), self._job.train.microbatch
            with user_code("absa.Run: the Hessian of model and loss, which the schedule needs"):
                sample = self._sample_of(core.Draw(0, 0))
                check_curvature(self._model, loss, sample, microbatch=microbatch)

        with self._core.clock("rehearsal"):
            raise_on_all_ranks(self._comm, check)

    # For the script

    @property
    def comm(self) -> Communicator:
        """The ranks, for the script's own collectives."""
        return self._comm

    @property
    def epoch(self) -> float:
        """Epochs visited."""
        return self._core.epoch

    def print(self, *words: object) -> None:
        """Print a line on rank 0, also where the ranks' output goes to log files."""
        self._log.print(" ".join(map(str, words)))

    def sum(self, value: float | Tensor) -> Tensor:
        """The sum of a number or tensor over all ranks (a collective), as float64."""
        return self._comm.allreduce_(
            torch.as_tensor(value).detach().to(self._device, torch.float64, copy=True).contiguous()
        )
