"""The core of a run: everything this project exists for, usable from any training loop.

A `Run` owns the order of samples, steps and boundaries, the schedule and its decisions, eigenvalue
estimates, checkpoints, stop requests, events, and the decision to continue with more ranks. A
training loop owns the model, the data, the loss and the optimizer, and calls the run:

    run.begin_phase()
    while (item := run.next()) is not None:
        if isinstance(item, Step):
            step = run.begin_step(item)
            for k in step.microbatches:
                with step.forward():
                    loss = ...  # the mean over microbatch k, or (sum, denominator)
                step.backward(loss, samples)
            run.end_step(item, step.optimize())
            continue
        if run.needs_evaluation(item):
            run.record_epoch(item, loss, accuracy)
        estimate = run.estimate_eigenvalue(item)
        if run.stopped:
            continue
        decision = run.decide(item, estimate)
        if step := run.cut_step(item, decision):
            ...  # take it, as above
        run.apply(item, decision, estimate)
    outcome = run.end()

All ranks call the same methods in the same order. Nothing here depends on what a sample, a loss or
a model looks like. `hpc_absa.training.trainer.Trainer` is the loop for job files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hpc_absa.checkpoint.async_checkpointer import AsyncCheckpointer, require_durable
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.curvature.estimate import Estimate, Interrupted
from hpc_absa.curvature.repeated import mean
from hpc_absa.errors import CollectiveError, ExitStatus
from hpc_absa.progress import Boundary, SampleStream, Step, decide
from hpc_absa.records import Decision, Observation, PhaseOutcome
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event
from hpc_absa.schedules import Rule
from hpc_absa.training.data import Draw
from hpc_absa.training.equal_ranks import require_equal
from hpc_absa.training.estimator import Estimator
from hpc_absa.training.faults import StopRequest
from hpc_absa.training.log import EventLogger
from hpc_absa.training.recorder import Recorder
from hpc_absa.training.state import TrainState
from hpc_absa.training.step import StepEngine, StepResult, TrainStep
from hpc_absa.training.sums import Flags


@dataclass(frozen=True)
class RunOptions:
    """What a run needs to know besides its components."""

    seed: int
    """Of the job."""
    data_digest: str
    """Identifies the data set in checkpoints."""
    job: str
    """The resolved job file, kept in checkpoints."""
    save_seconds: float
    """Longest time between checkpoints."""
    rank_limit: int
    """The largest number of ranks that a decision may choose."""
    ranks_for: Callable[[int], int]
    """The number of ranks for a global batch, at most `rank_limit`."""
    on_nonfinite_loss: Literal["stop", "continue"] = "stop"
    """Whether a loss that is infinite or NaN ends the run."""
    resumed_from: str | None = None
    """Name of the checkpoint that the state was restored from."""
    previous_end: Event | None = None
    """`phase_end` or `failure` of the launch before, to measure how long it took to continue."""
    environment: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of `phase_start` events."""


class Run:
    """One run on the present ranks, until it is done, stopped, or continues with more ranks."""

    def __init__(
        self,
        *,
        comm: Communicator,
        directory: RunDir,
        stream: SampleStream,
        rule: Rule,
        state: TrainState,
        engine: StepEngine,
        estimator: Estimator,
        checkpointer: AsyncCheckpointer,
        stop: StopRequest,
        log: EventLogger,
        options: RunOptions,
    ) -> None:
        """`state` is new or restored; `engine` has its model and optimizer.

        Raises:
            CollectiveError: the stream has too few samples for one step.
        """
        self.comm, self.directory, self.stream, self.rule = comm, directory, stream, rule
        self.state, self.engine, self.stop, self.log = state, engine, stop, log
        self.clock = engine.clock
        self._estimator, self._checkpointer, self.options = estimator, checkpointer, options
        self._outcome: Literal["done", "resize", "stopped"] | None = None
        self._flags = Flags()
        self._next_ranks = options.ranks_for(state.progress.schedule.global_batch)
        self._schedule_before = state.progress.schedule
        self._last_save = time.monotonic()
        self._nonfinite_step: int | None = None
        self._recorder = Recorder(self, log)
        if not state.progress.position.step:
            raise_on_all_ranks(
                comm, lambda: stream.require_step(state.progress.schedule.global_batch)
            )

    @property
    def stopped(self) -> bool:
        """Whether a stop was requested and everything is saved; `next` returns None then."""
        return self._outcome == "stopped"

    @property
    def steps_left(self) -> bool:
        """Whether the stream has another full step."""
        progress = self.state.progress
        full = progress.schedule.global_batch // self.stream.microbatch
        return progress.position.microbatch + full <= self.stream.microbatches

    @property
    def samples(self) -> int:
        """Samples that optimizer steps have used."""
        return self.state.progress.position.microbatch * self.stream.microbatch

    @property
    def epoch(self) -> float:
        """Epochs visited."""
        return self.stream.epoch(self.state.progress.position.microbatch)

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self.rule.lr(self.state.progress.schedule, self.epoch)

    @property
    def adversarial_fraction(self) -> float:
        """Fraction of adversarial examples in each microbatch of the next step."""
        return self.rule.adversarial_fraction(self.state.progress.schedule, self.epoch)

    # Steps

    def next(self) -> Boundary | Step | None:
        """What to do next; None when this phase of the run ends."""
        flags, self._flags = self._flags, Flags()
        self._checkpointer.update(flags.written, flags.failed)
        if self._outcome is None and flags.stop:
            self._outcome = "stopped"
            self.save()
        elif self._outcome is None and flags.save:
            self.save()
        return None if self._outcome else self.state.progress.next(self.stream)

    def begin_step(self, step: Step) -> TrainStep:
        """Start an optimizer step: this rank's microbatches, the learning rate, the flags."""
        self._recorder.step_begins()
        state = self.state.progress.schedule
        due = time.monotonic() - self._last_save >= self.options.save_seconds
        return self.engine.begin(
            step,
            divisor=state.global_batch // self.stream.microbatch,
            lr=self.lr,
            flags=Flags(
                self.stop.requested_here(),
                self.comm.rank == 0 and due,
                *self._checkpointer.flags(),
            ),
            measure_squares=self.rule.wants_gradients(state),
        )

    def end_step(self, step: Step, result: StepResult) -> None:
        """Record a finished step.

        Raises:
            CollectiveError: the loss is not finite, and the job stops then.
        """
        self._require_finite("loss", result.loss, self.state.progress.position.step + 1)
        progress = self.state.progress
        schedule = progress.schedule
        if result.squares:
            schedule = self.rule.learn(schedule, result.squares)
        self.state.progress = replace(
            progress,
            position=progress.position.after(step),
            schedule=schedule,
            epoch_loss=progress.epoch_loss + result.loss,
            epoch_samples=progress.epoch_samples + result.denominator,
        )
        self._flags = result.flags
        self._recorder.step_ends(result)

    # Boundaries

    def needs_evaluation(self, boundary: Boundary) -> bool:
        """Whether an epoch ends here that was not evaluated before a stop."""
        return boundary.ends_epoch and self.state.progress.epoch < round(boundary.epoch)

    def record_epoch(
        self,
        boundary: Boundary,
        loss: float | None,
        accuracy: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Record the evaluation at the end of an epoch.

        Args:
            boundary: the end of the epoch.
            loss: on the test set; None if there is none.
            accuracy: on the test set; None where there is none.
            metrics: what else was measured, by name; the first is shown.

        Raises:
            CollectiveError: the last step made the weights infinite or NaN, and the job stops then.
        """
        progress = self.state.progress
        weights = self.state.model.parameters()
        if not math.isfinite(loss or 0.0) and not all(p.isfinite().all() for p in weights):
            self._require_finite("test loss", math.nan, progress.position.step)
        counted = progress.epoch_samples  # none where a step is longer than the epoch
        train_loss = progress.epoch_loss / counted if counted else None
        self.state.progress = replace(
            progress,
            epoch=round(boundary.epoch),
            epoch_loss=0.0,
            epoch_samples=0,
            test_accuracy=accuracy,
        )
        self._recorder.epoch(train_loss, loss, accuracy, metrics)

    def _require_finite(self, what: str, loss: float, step: int) -> None:
        if math.isfinite(loss) or self._nonfinite_step is not None:
            return
        self._nonfinite_step = step
        self._recorder.nonfinite_loss(step)
        reason = (
            f"the {what} is not finite at step {step} (epoch {self.epoch:.2f}, learning rate "
            f"{self.lr:.4g})"
        )
        if self.options.on_nonfinite_loss == "stop":
            raise CollectiveError(
                f"{reason}: lower train.lr, set train.max_grad_norm, or check data and loss "
                "(train.on_nonfinite_loss = 'continue' trains on)",
                ExitStatus.FAILED,
            )
        self.log.print(f"warning: {reason}; training continues")

    def estimate_eigenvalue(self, boundary: Boundary) -> Estimate | None:
        """The top eigenvalue of the Hessian, if the schedule wants it for its decision here.

        The mean of several estimates on other samples each, if the schedule wants another one. If a
        stop is requested meanwhile, the run is saved and `stopped` on return.
        """
        state, rule = self.state, self.rule
        schedule = state.progress.schedule
        if not boundary.decision_point or boundary.last or not rule.wants_eigenvalue(schedule):
            return None
        threshold, place = rule.threshold(schedule), state.progress.position.boundary
        vector, estimates = state.eigenvector, list[Estimate]()
        try:
            with self.clock("hessian"):
                while not estimates or self._wants_another(estimates):
                    k, done = len(estimates), sum(e.eigenvalue.value for e in estimates)
                    limit = None if threshold is None else (k + 1) * threshold - done
                    estimates.append(
                        self._estimator(vector, limit, self.stop.requested, Draw(place, k))
                    )
                    vector = estimates[-1].vector
        except Interrupted:
            self._outcome = "stopped"
            self.save()
            return None
        estimate = mean(estimates)
        state.eigenvector = estimate.vector
        state.progress = replace(state.progress, eigenvalue=estimate.eigenvalue.value)
        return estimate

    def _wants_another(self, estimates: list[Estimate]) -> bool:
        seen, count = mean(estimates).eigenvalue, len(estimates)
        wanted = self.rule.wants_another(self.state.progress.schedule, seen, count)
        return bool(self.comm.broadcast_object(wanted))

    def decide(self, boundary: Boundary, estimate: Estimate | None) -> Decision:
        """The schedule's decision, made by rank 0 and the same on all ranks.

        Raises:
            CollectiveError: a user-defined schedule failed.
        """
        comm, schedule = self.comm, self.state.progress.schedule
        eigenvalue = estimate.eigenvalue if estimate else None
        observation = Observation(boundary.epoch, boundary.decision_point, eigenvalue)
        decision = raise_on_all_ranks(
            comm,
            lambda: decide(self.rule, schedule, boundary, observation) if comm.rank == 0 else None,
        )
        self._schedule_before = schedule
        return comm.broadcast_object(decision)

    def cut_step(self, boundary: Boundary, decision: Decision) -> Step | None:
        """The step to take before `decision` applies, still with the old batch; None for none."""
        return self.state.progress.cut_step(boundary, decision)

    def apply(self, boundary: Boundary, decision: Decision, estimate: Estimate | None) -> None:
        """Put a decision into effect, record and save it; after a growth a new phase begins."""
        grows = decision.action == "grow"
        self.state.progress = self.state.progress.after_boundary(decision)
        if grows:
            self._next_ranks = self.options.ranks_for(decision.state.global_batch)
        if boundary.decision_point or grows:
            before, ranks = self._schedule_before, self._next_ranks
            self._recorder.decision(boundary, decision, before, estimate, ranks)
        self.save()
        if not grows:
            return
        if not self.end_for_more_ranks():
            self._recorder.phase_ends("in_place", self.comm.size)
            self.begin_phase()

    # Phases

    def end_for_more_ranks(self) -> bool:
        """End the phase if the batch feeds more ranks than there are; whether it does."""
        if self._next_ranks > self.comm.size:
            self._outcome = "resize"
        return self._next_ranks > self.comm.size

    def begin_phase(self) -> None:
        """Record the start of a phase (a collective)."""
        self._recorder.phase_begins()

    def end(self) -> PhaseOutcome:
        """End the phase; the state is on disk on return.

        Raises:
            CollectiveError: the state cannot be saved.
        """
        outcome = self._outcome or "done"
        with self.clock("checkpoint"), self.stop.saving():
            require_durable(self._checkpointer, self.save)
        ranks = self._next_ranks if outcome == "resize" else self.comm.size
        self._recorder.phase_ends(outcome, ranks)
        if outcome == "done":
            self._recorder.done(self._nonfinite_step)
            self._checkpointer.close()  # a script may go on
        return PhaseOutcome(outcome, ranks, self.state.progress.phase)

    # Checkpoints

    def save(self) -> None:
        """Start to save the present state (a collective).

        Raises:
            CollectiveError: ranks have different states, a state cannot be saved, or a save failed
                and the job stops then.
        """
        self._last_save = time.monotonic()
        self._flags = self._flags._replace(written=0, failed=0)  # of the save before this one
        options, progress = self.options, self.state.progress
        step = progress.position.step
        self.engine.buffers.restore()
        with self.clock("checkpoint"), self.stop.saving():
            raise_on_all_ranks(self.comm, self.engine.require_known_parameters)
            tensors = raise_on_all_ranks(self.comm, self.state.tensors)
            require_equal(tensors, self.comm)
            scalars = self.state.scalars(
                options.seed,
                options.data_digest,
                options.job,
                world_size=self.comm.size,
                global_batch=progress.schedule.global_batch,
                samples=self.samples,
                next_ranks=self._next_ranks,
                rank_limit=options.rank_limit,
            )
            path = self.directory.checkpoint(step, progress.phase)
            on_saved = self.log.on_saved(progress.phase, step, self.samples)
            ends = self._outcome or self._next_ranks > self.comm.size or not self.steps_left
            self._checkpointer.save(path, scalars, tensors, on_saved, training=not ends)

    def wait_for_writes(self) -> None:
        """Return once this rank writes nothing any more, as after an error; not a collective."""
        self._checkpointer.wait()
        self._checkpointer.close()  # a script may go on
