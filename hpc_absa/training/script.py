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
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from hpc_absa.allocation import ALLOW_CHANGED, REHEARSED
from hpc_absa.comm import Communicator, connect, raise_on_all_ranks
from hpc_absa.curvature.loss import Loss
from hpc_absa.errors import CollectiveError, ExitStatus, MisuseError, UsageError
from hpc_absa.progress import Boundary
from hpc_absa.progress import Step as Microbatches
from hpc_absa.rundir import RunDir
from hpc_absa.schedules import Schedule
from hpc_absa.training.calls import Call
from hpc_absa.training.evaluate import evaluating
from hpc_absa.training.faults import SIGNALS
from hpc_absa.training.rank import Session, exit_status, launcher_output, supervised
from hpc_absa.training.script_build import build
from hpc_absa.training.script_job import Arguments, directory_of, job_of
from hpc_absa.training.script_step import Step
from hpc_absa.training.state import Stateful

if TYPE_CHECKING:
    from torch.amp.grad_scaler import GradScaler
    from torch.optim.lr_scheduler import LRScheduler


class MapStyle(Protocol):
    """A map-style data set: `torch.utils.data.Dataset`, a list, or anything else like them."""

    def __getitem__(self, index: int, /) -> Any: ...
    def __len__(self) -> int: ...


Metrics = Mapping[str, float | Tensor]

WITHOUT_LOSS = "absa.Run: ReduceLROnPlateau needs the loss from evaluate"


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
            evaluate: called on all ranks at the end of each epoch, with the model and the modules
                in `state` in evaluation mode, and without gradients; returns the test loss, or
                metrics by name, of which `loss` and `accuracy` are shown as such. Rank 0's result
                counts.
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
        self._evaluate, self._lr_scheduler = evaluate, lr_scheduler
        states = dict(state or {})
        for name, own in (("lr_scheduler", lr_scheduler), ("scaler", scaler)):
            if own is not None:
                states[name + "_" * (name in states)] = own
        tables = {
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
            },
        }
        self._given = Arguments(
            model, optimizer, loss, dataset, collate_fn, samples, hessian_batch, scaler, states,
            tables, dict(train or {}),
        )  # fmt: skip
        self._session: Session | None = None
        self._state: Literal["new", "running", "ended", "closed"] = "new"

    # The context

    def __enter__(self) -> Run:
        if self._session:
            raise MisuseError("absa.Run: a run is entered once; make another one")
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise UsageError(
                "absa.Run: a worker process imports this script, which starts a run there: "
                "expected all but imports and definitions under if __name__ == '__main__':"
            )
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}
        comm = connect()
        self.rank, self.size, self._comm = comm.rank, comm.size, comm
        console = launcher_output() if supervised() else sys.stdout
        self._cleanup = contextlib.ExitStack()
        try:
            path = raise_on_all_ranks(comm, lambda: directory_of(self._path))
            self._session = Session(comm, RunDir(path), console)
            self._calls = self._session.calls
            run = self._session.directory
            job = self._session.begin(lambda: job_of(run, self._given, comm.size))
            self._parts = build(job, self._given, self._session, self._allow_changed, self._cleanup)
            self._core, self._log = self._parts.core, self._parts.core.log
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
        assert self._session is not None
        try:
            self._calls.exchange(Call.LEAVE)
            if self._state == "new":  # the script has no loop
                self._session.close()
            elif self._state == "running":  # the script left its loop
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
        self._state = "closed"
        self._cleanup.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    # The iteration

    def __iter__(self) -> Iterator[Step]:
        """The optimizer steps that are left.

        Raises:
            UsageError: the body of the loop did not use a step as it must.
        """
        if self._state != "new" or self._session is None:
            raise MisuseError("absa.Run: expected one iteration, within `with absa.Run(...)`")
        if isinstance(self._lr_scheduler, ReduceLROnPlateau) and self._evaluate is None:
            raise MisuseError(WITHOUT_LOSS)
        self._state = "running"
        run, log = self._core, self._session.directory.log
        done = self._calls.exchange(Call.BEGIN, log.last("done"))[0]
        steps = run.state.progress.position.step
        if done and done.get("steps") == steps and not self._allow_changed:
            self._log.print(f"{self._session.directory.path}: already done")
            self._state = "ended"
            self._session.close()
            return
        run.begin_phase()
        if not self._parts.resumed and supervised() and run.end_for_more_ranks():
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
        step = Step(self._core, self._parts.loader, item, self._parts.optimizer, self._calls)
        with step.computing:
            yield step
            if not step.optimized:
                raise MisuseError("a step ended without step.optimize()")
        self._calls.enter(Call.CONTINUE)

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

    # Boundaries

    def _end_epoch(self, boundary: Boundary) -> None:
        metrics = self._measured()
        loss = metrics.pop("loss", None)
        self._core.record_epoch(boundary, loss, metrics.get("accuracy"), metrics)
        if isinstance(self._lr_scheduler, ReduceLROnPlateau):
            if loss is None:
                raise MisuseError(WITHOUT_LOSS)
            self._lr_scheduler.step(loss)
        elif self._lr_scheduler is not None:
            self._lr_scheduler.step()

    def _measured(self) -> dict[str, float]:
        """Rank 0's result of the user's function."""
        if self._evaluate is None:
            return {}
        assert self._session is not None
        others = [each for each in self._given.states.values() if isinstance(each, nn.Module)]
        models = evaluating(self._given.model, *others)
        with self._core.clock("eval"), self._session.stop.saving(), models:
            result = self._evaluate()
        try:
            if result is None:
                result = {}
            elif not isinstance(result, Mapping):
                result = {"loss": float(result)}
            metrics = {str(name): float(value) for name, value in result.items()}
        except (TypeError, ValueError, RuntimeError):
            raise MisuseError(
                f"evaluate returned {result!r:.80}: expected the test loss, numbers by name such "
                'as {"loss": 0.5, "accuracy": 0.9}, or None'
            ) from None
        return self._calls.exchange(Call.EVALUATE, metrics)[0]

    def _rehearse(self) -> None:
        """Require that the Hessian can be computed, before the first step."""
        schedule = self._core.state.progress.schedule
        if REHEARSED not in os.environ and self._core.rule.wants_eigenvalue(schedule):
            with self._core.clock("rehearsal"):
                notes = raise_on_all_ranks(self._comm, self._parts.hessian.check)
            for note in notes:
                self._log.print(note)

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
        if self._state == "closed":
            raise MisuseError("run.sum: expected within `with absa.Run(...)`")
        tensor = torch.as_tensor(value).detach().to("cpu", torch.float64)
        return (
            torch.stack(self._calls.exchange(Call.SUM, tensor)).sum(0).to(self._core.engine.device)
        )
