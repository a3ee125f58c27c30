"""The events and console lines of a run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hpc_absa.curvature.estimate import Estimate
from hpc_absa.errors import RunDirError
from hpc_absa.progress import Boundary
from hpc_absa.records import Decision, Eigenvalue, ScheduleState
from hpc_absa.rundir.events import Event
from hpc_absa.rundir.lock import host
from hpc_absa.training.log import EventLogger, ProgressMeter, duration, memory_in_use
from hpc_absa.training.metrics import shown
from hpc_absa.training.step import StepResult

if TYPE_CHECKING:
    from hpc_absa.training.run import Run

EVIDENCE = (
    "residual", "converged", "stopped_above_threshold", "seconds", "error", "sampling_error",
    "upper_bound",
)  # fmt: skip
"""Fields of an eigenvalue that a decision event has under the same names."""


class Recorder:
    """Writes what happens to a run; reads the run and changes nothing of it."""

    def __init__(self, run: Run, log: EventLogger) -> None:
        self._run, self._log = run, log
        self._resumed_from = run.options.resumed_from
        self._previous_end: Event | None = run.options.previous_end
        self._meter = ProgressMeter()
        self._measured = ""
        """Of the test set, for the last line."""

    def phase_begins(self) -> None:
        run, progress = self._run, self._run.state.progress
        environment = run.options.environment
        self._log.emit(
            "phase_start",
            progress.phase,
            **self._place(),
            resumed_from=self._resumed_from,
            training_samples=run.stream.samples,
            hosts=sorted(set(run.comm.allgather_object(host()))),
            backend=run.comm.backend,
            **environment,
        )
        words = [
            f"phase {progress.phase}",
            f"{_count(run.comm.size, 'rank')} ({run.comm.backend})",
            f"batch {progress.schedule.global_batch}",
            f"learning rate {run.lr:.4g}",
        ]
        if environment:
            words.append(
                f"{environment['threads_per_rank']} threads a rank on {environment['device']}"
            )
        if self._resumed_from:
            words.append(f"from {self._resumed_from}")
        self._log.print(" · ".join(words))
        self._resumed_from = None
        self._meter = ProgressMeter()
        self._phase, self._phase_step = progress.phase, progress.position.step
        self._phase_samples, self._phase_begun = run.samples, time.monotonic()

    def step_begins(self) -> None:
        self._meter.begin_step()

    def step_ends(self, result: StepResult) -> None:
        run = self._run
        if before := self._previous_end:
            restarted = before["event"] == "failure"
            self._log.emit(
                "restart" if restarted else "resize",
                run.state.progress.phase,
                **({} if restarted else {"from_ranks": before.get("ranks")}),
                to_ranks=run.comm.size,
                seconds=time.time() - before["time"],
            )
            self._previous_end = None
        self._meter.end_step(result.loss, result.denominator, result.samples)
        if run.comm.rank == 0 and self._meter.due():
            self._progress(result)
        if self._log.line_due():
            self._log.print(self._line(result.loss / (result.denominator or 1.0)))

    def _progress(self, result: StepResult) -> None:
        """A `progress` event (on rank 0); training continues where it cannot be written."""
        run = self._run
        with contextlib.suppress(RunDirError):
            self._log.emit(
                "progress",
                run.state.progress.phase,
                **self._place(),
                **self._meter.take(),
                grad_norm=run.engine.grad_norm(result),
                memory=memory_in_use(run.engine.device),
            )

    def epoch(
        self,
        train_loss: float | None,
        test_loss: float | None,
        accuracy: float | None,
        metrics: Mapping[str, float] | None,
    ) -> None:
        progress = self._run.state.progress
        self._log.emit_when_saved(
            "epoch",
            progress.phase,
            **self._place() | {"epoch": progress.epoch},
            train_loss=train_loss,
            test_accuracy=accuracy,
            test_loss=test_loss,
            metrics=dict(metrics or {}),
            samples_per_second=self._samples_per_second(),
        )
        if metrics is None and accuracy is not None:
            metrics = {"accuracy": accuracy}
        self._measured = shown(metrics or {}, test_loss)
        tested = f" · test {self._measured}" if self._measured else ""
        self._log.print(self._line(train_loss) + tested)

    def nonfinite_loss(self, step: int) -> None:
        run = self._run
        self._log.emit(
            "nonfinite_loss",
            run.state.progress.phase,
            step=step,
            epoch=run.epoch,
            lr=run.lr,
            action=run.options.on_nonfinite_loss,
        )

    def decision(
        self,
        boundary: Boundary,
        decision: Decision,
        before: ScheduleState,
        estimate: Estimate | None,
        next_ranks: int,
    ) -> None:
        """`before` is the state that the decision was made in."""
        run, progress, ranks = self._run, self._run.state.progress, self._run.comm.size
        grows = decision.action == "grow"
        next_ranks = max(ranks, next_ranks) if grows else ranks
        reason = decision.reason + (f", ranks {ranks} → {next_ranks}" * (next_ranks != ranks))
        eigenvalue = estimate.eigenvalue if estimate else None
        measured = run.rule.evidence(before)
        self._log.emit_when_saved(
            "decision",
            progress.phase - grows,
            epoch=boundary.epoch,
            step=progress.position.step,
            samples=run.samples,
            **_evidence(eigenvalue),
            reference=before.reference,
            action=decision.action,
            cause=decision.cause if grows else None,
            reason=reason,
            batch=before.global_batch,
            next_batch=decision.state.global_batch,
            ranks=ranks,
            next_ranks=next_ranks,
            lr=before.lr,
            next_lr=decision.state.lr,
            **measured,
        )
        if eigenvalue or measured or grows:
            self._log.print(f"decision at epoch {boundary.epoch:g} · {reason}")

    def phase_ends(self, outcome: str, next_ranks: int) -> None:
        """A collective."""
        run, position = self._run, self._run.state.progress.position
        ranks = run.comm.allgather_object(run.clock.seconds())
        run.clock.restart()
        self._log.emit(
            "phase_end",
            self._phase,
            seconds={kind: sum(s[kind] for s in ranks) / len(ranks) for kind in ranks[0]},
            outcome=outcome,
            ranks=run.comm.size,
            next_ranks=next_ranks,
            step=position.step,
            steps=position.step - self._phase_step,
            samples=run.samples,
            epoch=run.epoch,
        )

    def done(self, nonfinite_step: int | None) -> None:
        progress = self._run.state.progress
        accuracy, steps = progress.test_accuracy, progress.position.step
        self._log.emit(
            "done", progress.phase, steps=steps, epochs=progress.epoch, test_accuracy=accuracy
        )
        if accuracy is not None and not self._measured:  # measured before a stop
            self._measured = f"accuracy {accuracy:.2%}"
        self._log.print(
            f"done · {steps} steps · {progress.epoch} epochs"
            + (f" · test {self._measured}" if self._measured else "")
            + (
                f" · loss not finite since step {nonfinite_step}"
                if nonfinite_step is not None
                else ""
            )
        )

    def _place(self) -> dict[str, Any]:
        """How far the run is, and how it takes steps."""
        run, progress = self._run, self._run.state.progress
        return {
            "epoch": run.epoch,
            "step": progress.position.step,
            "samples": run.samples,
            "lr": run.lr,
            "global_batch": progress.schedule.global_batch,
            "ranks": run.comm.size,
        }

    def _samples_per_second(self) -> float:
        """Since the phase began."""
        seconds = time.monotonic() - self._phase_begun
        return (self._run.samples - self._phase_samples) / max(seconds, 1e-9)

    def _line(self, loss: float | None) -> str:
        run, progress = self._run, self._run.state.progress
        left = run.stream.microbatches * run.stream.microbatch - run.samples
        rate = self._samples_per_second()
        words = [
            f"phase {progress.phase}",
            f"epoch {run.epoch:.1f}/{run.stream.epochs}",
            f"step {progress.position.step}",
            f"{rate:.0f} samples/s",
        ]
        if loss is not None:
            words.append(f"loss {loss:.3f}")
        if progress.eigenvalue is not None:
            words.append(f"λ {progress.eigenvalue:.4g}")
        words.append(f"B {progress.schedule.global_batch}")
        words.append(f"ranks {run.comm.size}")
        words.append(f"{duration(left / rate) if rate else '?'} left")
        return " · ".join(words)


def _evidence(eigenvalue: Eigenvalue | None) -> dict[str, Any]:
    """The fields of a decision event that describe the estimate."""
    if eigenvalue is None:
        fields: dict[str, Any] = {"eigenvalue": None, **dict.fromkeys(EVIDENCE)}
        fields |= {"matvecs": 0, "hessian_samples": 0}
    else:
        fields = {"eigenvalue": eigenvalue.value}
        fields |= {name: getattr(eigenvalue, name) for name in EVIDENCE}
        fields |= {"matvecs": eigenvalue.matvecs, "hessian_samples": eigenvalue.samples}
    return fields | {"settled": fields["stopped_above_threshold"]}  # its former name


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
