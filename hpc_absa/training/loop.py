"""The phases of a run within one world of ranks, readable as one paragraph: `Loop.run`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from hpc_absa import config
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.curvature.probe import Estimate, Interrupted, estimate
from hpc_absa.data.batches import Microbatch
from hpc_absa.progress import Boundary, Position, Step
from hpc_absa.records import Decision, Observation, PhaseOutcome, ScheduleState
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event
from hpc_absa.rundir.lock import host
from hpc_absa.training.assembly import Parts
from hpc_absa.training.evaluate import evaluate
from hpc_absa.training.narrator import Narrator, duration
from hpc_absa.training.saving import Saver, require_durable
from hpc_absa.training.state import Live, Progress, described, scalars, tensors
from hpc_absa.training.step import Flags, StepResult
from hpc_absa.training.stop import StopRequest
from hpc_absa.worldsize import ranks_for

EVALUATED = 256
"""Test images of one forward pass."""


class Loop:
    """One world's work: steps, boundaries and decisions, until done or in need of more ranks."""

    def __init__(
        self,
        parts: Parts,
        live: Live,
        progress: Progress,
        origin: str | None,
        comm: Communicator,
        run: RunDir,
        narrator: Narrator,
        stop: StopRequest,
        saver: Saver,
        limit: int,
        follows: Event | None,
    ) -> None:
        """Put together by `worker.work`.

        Args:
            parts: what the job needs.
            live: the tensors.
            progress: how far they have come.
            origin: name of the checkpoint resumed from.
            comm: the world.
            run: its files.
            narrator: tells of it.
            stop: asks for its end.
            saver: puts its states on disk.
            limit: the largest number of ranks the job may ask for.
            follows: the `phase_end` event of the smaller world before this one, to time the resize.
        """
        self._parts, self._live, self._progress, self._origin = parts, live, progress, origin
        self._comm, self._run, self._narrator, self._stop = comm, run, narrator, stop
        self._saver = saver
        self._limit, self._follows = limit, follows
        self._course, self._clock = parts.course, parts.clock
        self._feed: Iterator[Microbatch] | None = None
        self._last_save = time.monotonic()

    def run(self) -> PhaseOutcome:
        """Train until done, until a decision asks for more ranks, or until asked to stop."""
        self._begin_phase()
        while (move := self._next()) is not None:
            if isinstance(move, Boundary):
                decision = self._meet(move)
                if decision is None:
                    return self._end("stopped")
                if decision.action == "grow" and (wanted := self._grow()) > self._comm.size:
                    return self._end("resize", wanted)
            else:
                told = self._take(move).flags
                self._saver.heard(told.written, told.failed)
                if told.stop:
                    self._save()
                    return self._end("stopped")
                if told.save:
                    self._save()
        return self._finish()

    def _next(self) -> Boundary | Step | None:
        return self._course.next(self._progress.position, self._microbatches())

    def _microbatches(self) -> int:
        """Microbatches M of a full step."""
        return self._progress.schedule.global_batch // self._course.microbatch

    # A step

    def _take(self, step: Step) -> StepResult:
        progress = self._progress
        position, schedule, rule = progress.position, progress.schedule, self._parts.rule
        epoch = self._epochs(position.microbatch)
        if step.stop - step.start < self._microbatches():
            # A cut step: shared out among the ranks otherwise than the full one that was fed.
            self._drop_feed()
            lanes = self._parts.stepper.lanes(range(step.start, step.stop))
            self._feed = self._parts.batches.prefetch(k for lane in lanes for k in lane)
        elif self._feed is None:
            self._feed = self._parts.batches.prefetch(self._upcoming(position))
        result = self._parts.stepper.take(
            range(step.start, step.stop),
            self._feed,
            divisor=self._microbatches(),
            lr=rule.lr(schedule, epoch),
            adversarial_fraction=rule.adversarial_fraction(schedule, epoch),
            steps_before=position.step,
            flags=self._flags(),
            wants_squares=rule.wants_gradients(schedule),
        )
        if result.squares:
            schedule = rule.learn(schedule, result.squares)
        self._progress = replace(
            progress,
            position=replace(position, microbatch=step.stop, step=position.step + 1),
            schedule=schedule,
            epoch_loss=progress.epoch_loss + result.loss,
            epoch_samples=progress.epoch_samples + result.samples,
        )
        self._after_step(result)
        return result

    def _flags(self) -> Flags:
        """What this rank has to tell the others."""
        due = time.monotonic() - self._last_save >= self._parts.job.checkpoint.every_seconds
        return Flags(self._stop.here(), self._comm.rank == 0 and due, *self._saver.flags())

    def _after_step(self, result: StepResult) -> None:
        if self._follows:
            self._narrator.emit(
                "resize",
                self._progress.phase,
                from_ranks=self._follows["ranks"],
                to_ranks=self._comm.size,
                seconds=time.time() - self._follows["time"],
            )
            self._follows = None
        self._narrator.progress(self._line(result.loss / max(result.samples, 1)))

    def _upcoming(self, position: Position) -> Iterator[int]:
        """This rank's microbatches of the coming full steps, as long as the batch stays."""
        start, per_step = position.microbatch, self._microbatches()
        while (stop := start + per_step) <= self._course.microbatches:
            for lane in self._parts.stepper.lanes(range(start, stop)):
                yield from lane
            start = stop

    def _drop_feed(self) -> None:
        if self._feed is not None:
            self._feed.close()  # type: ignore[attr-defined]
            self._feed = None

    # A boundary

    def _meet(self, boundary: Boundary) -> Decision | None:
        """Evaluate, estimate, decide, save; None where a stop was asked for in between."""
        last = boundary == self._course.boundaries[-1]
        probe = self._probe(boundary) if boundary.decision_point and not last else None
        if isinstance(probe, Interrupted):
            self._save()
            return None
        if boundary.ends_epoch:
            self._end_epoch(boundary)
        before = self._progress.schedule
        decision = self._decide(boundary, probe, last)
        position = self._progress.position
        self._progress = replace(
            self._progress, position=replace(position, boundary=position.boundary + 1)
        )
        if decision.action == "grow" and position.microbatch < boundary.microbatch:
            # The step that straddles this boundary is cut here, still under the old batch.
            self._take(Step(position.microbatch, boundary.microbatch))
        self._progress = replace(self._progress, schedule=decision.state)
        if decision.action == "grow":
            self._drop_feed()
            self._progress = replace(self._progress, phase=self._progress.phase + 1)
        if boundary.decision_point or decision.action == "grow":
            self._tell(boundary, decision, before, probe)
        self._save()
        return decision

    def _decide(self, boundary: Boundary, probe: Estimate | None, last: bool) -> Decision:
        seen = Observation(
            boundary.epoch, boundary.decision_point, probe.eigenvalue if probe else None
        )
        if last:
            return Decision("finish", "all epochs are visited", self._progress.schedule)
        state, comm = self._progress.schedule, self._comm
        decided = raise_on_all_ranks(
            comm, lambda: self._parts.rule.decide(state, seen) if comm.rank == 0 else None
        )
        return comm.broadcast_object(decided)

    def _probe(self, boundary: Boundary) -> Estimate | Interrupted | None:
        """The top eigenvalue where the rule wants it."""
        if not self._parts.rule.wants_eigenvalue(self._progress.schedule):
            return None
        hessian = self._parts.job.hessian
        with self._clock("hessian"):
            try:
                found = estimate(
                    self._live.model,
                    self._parts.loss,
                    self._parts.hessian_sample,
                    self._comm,
                    method=hessian.method,
                    samples=min(hessian.samples, self._parts.hessian_sample.size),
                    microbatch=self._course.microbatch,
                    tol=hessian.tol,
                    max_iter=hessian.max_iter,
                    start=self._live.eigenvector,
                    threshold=self._parts.rule.threshold(self._progress.schedule),
                    poll=self._stop.agreed,
                    reproducible=self._parts.job.train.reproducible,
                )
            except Interrupted as interrupted:
                return interrupted
        self._live = replace(self._live, eigenvector=found.vector)
        self._progress = replace(self._progress, eigenvalue=found.eigenvalue.value)
        return found

    def _end_epoch(self, boundary: Boundary) -> None:
        with self._clock("eval"):
            found = evaluate(
                self._live.model,
                self._parts.loss,
                self._stop.alive(
                    self._parts.batches.evaluation(self._comm.rank, self._comm.size, EVALUATED)
                ),
                self._comm,
            )
        progress = self._progress
        train_loss = progress.epoch_loss / max(progress.epoch_samples, 1)
        self._progress = replace(
            progress,
            epoch=round(boundary.epoch),
            epoch_loss=0.0,
            epoch_samples=0,
            test_accuracy=found.accuracy,
        )
        self._narrator.emit_when_saved(
            "epoch",
            progress.phase,
            epoch=round(boundary.epoch),
            step=progress.position.step,
            samples=self._samples(),
            train_loss=train_loss,
            test_accuracy=found.accuracy,
            test_loss=found.loss,
            lr=self._lr(),
            global_batch=progress.schedule.global_batch,
            ranks=self._comm.size,
            samples_per_second=self._rate(),
        )
        self._narrator.say(f"{self._line(train_loss)} · test accuracy {found.accuracy:.2%}")

    def _tell(
        self, boundary: Boundary, decision: Decision, before: ScheduleState, probe: Estimate | None
    ) -> None:
        ranks, grows = self._comm.size, decision.action == "grow"
        wanted = self._wanted_ranks(decision.state.global_batch) if grows else ranks
        self._narrator.decision(
            self._progress.phase - grows,
            boundary.epoch,
            before,
            probe.eigenvalue if probe else None,
            decision,
            step=self._progress.position.step,
            samples=self._samples(),
            ranks=ranks,
            next_ranks=max(ranks, wanted),
            **self._parts.rule.evidence(before),
        )

    def _wanted_ranks(self, global_batch: int) -> int:
        return ranks_for(self._parts.job, global_batch, self._limit)

    def _grow(self) -> int:
        """Ranks the grown batch wants; where that is no more than there are, go on in place."""
        wanted = self._wanted_ranks(self._progress.schedule.global_batch)
        if wanted <= self._comm.size:
            self._end_phase("in_place", self._comm.size, self._progress.phase - 1)
            self._begin_phase()
        return wanted

    # Phases

    def _begin_phase(self) -> None:
        progress = self._progress
        hosts = self._comm.allgather_object(host())
        self._narrator.emit(
            "phase_start",
            progress.phase,
            ranks=self._comm.size,
            global_batch=progress.schedule.global_batch,
            lr=self._lr(),
            resumed_from=self._origin,
            step=progress.position.step,
            samples=self._samples(),
            epoch=self._epochs(progress.position.microbatch),
            hosts=sorted(set(hosts)),
            backend=self._comm.backend,
            threads_per_rank=self._parts.threads,
            device=str(self._parts.device),
        )
        resumed = f" · from {self._origin}" if self._origin else ""
        self._narrator.say(
            f"phase {progress.phase} · {_ranks(self._comm.size)} ({self._comm.backend}) · "
            f"batch {progress.schedule.global_batch} · learning rate {self._lr():.4g} · "
            f"{self._parts.threads} threads a rank on {self._parts.device}{resumed}"
        )
        self._origin = None
        self._phase_step = progress.position.step
        self._phase_samples, self._phase_begun = self._samples(), time.monotonic()

    def _end(self, outcome: Any, wanted: int | None = None) -> PhaseOutcome:
        """Leave this world; the last checkpoint is durable on return."""
        self._drop_feed()
        with self._clock("checkpoint"), self._stop.busy():
            require_durable(self._saver, self._save)
        phase = self._progress.phase - (outcome == "resize")
        self._end_phase(outcome, wanted or self._comm.size, phase)
        return PhaseOutcome(outcome, wanted or self._comm.size, self._progress.phase)

    def _end_phase(self, outcome: str, next_ranks: int, phase: int) -> None:
        seconds = self._clock.seconds()
        self._clock.restart()
        everyone = self._comm.allgather_object(seconds)
        mean = {kind: sum(s[kind] for s in everyone) / len(everyone) for kind in seconds}
        self._narrator.emit(
            "phase_end",
            phase,
            seconds=mean,
            outcome=outcome,
            ranks=self._comm.size,
            next_ranks=next_ranks,
            step=self._progress.position.step,
            steps=self._progress.position.step - self._phase_step,
            samples=self._samples(),
            epoch=self._epochs(self._progress.position.microbatch),
        )

    def _finish(self) -> PhaseOutcome:
        outcome = self._end("done")
        self._narrator.emit(
            "done",
            self._progress.phase,
            steps=self._progress.position.step,
            epochs=self._progress.epoch,
            test_accuracy=self._progress.test_accuracy,
        )
        accuracy = self._progress.test_accuracy
        self._narrator.say(
            f"done · {self._progress.position.step} steps · {self._progress.epoch} epochs"
            + (f" · test accuracy {accuracy:.2%}" if accuracy is not None else "")
        )
        return outcome

    # Saving

    def _save(self) -> None:
        """Begin to save the present state (a collective)."""
        self._last_save = time.monotonic()
        progress, parts = self._progress, self._parts
        with self._clock("checkpoint"), self._stop.busy():
            content = described(
                scalars(progress, parts.job.seed, parts.dataset.digest, config.dump(parts.job)),
                world_size=self._comm.size,
                global_batch=progress.schedule.global_batch,
                samples=self._samples(),
            )
            step = progress.position.step
            path = self._run.checkpoint(step, progress.phase)
            then = self._narrator.on_saved(progress.phase, step, self._samples())
            self._saver.save(path, content, tensors(self._live), then)

    # Numbers

    def _samples(self) -> int:
        return self._progress.position.microbatch * self._course.microbatch

    def _epochs(self, microbatch: int) -> float:
        return microbatch * self._course.microbatch / self._course.samples

    def _lr(self) -> float:
        progress = self._progress
        return self._parts.rule.lr(progress.schedule, self._epochs(progress.position.microbatch))

    def _rate(self) -> float:
        """Samples a second since the phase began."""
        seconds = time.monotonic() - self._phase_begun
        return (self._samples() - self._phase_samples) / max(seconds, 1e-9)

    def _line(self, loss: float) -> str:
        """Where the run stands, for people."""
        progress = self._progress
        left = self._course.microbatches * self._course.microbatch - self._samples()
        rate = self._rate()
        remaining = duration(left / rate) if rate else "?"
        eigenvalue = f" · λ {progress.eigenvalue:.4g}" if progress.eigenvalue is not None else ""
        return (
            f"phase {progress.phase} · epoch {self._epochs(progress.position.microbatch):.1f}"
            f"/{self._course.epochs} · step {progress.position.step} · {rate:.0f} samples/s · "
            f"loss {loss:.3f}{eigenvalue} · B {progress.schedule.global_batch} · "
            f"ranks {self._comm.size} · {remaining} left"
        )


def _ranks(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"
