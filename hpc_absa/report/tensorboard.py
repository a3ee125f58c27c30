"""`D/tensorboard`: the events of a run as TensorBoard scalars, brought up to date as they come.

Everything is derived from `events.jsonl`, so that a supervisor that starts anew begins these files
anew as well and nothing is counted twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event

SCALARS = {
    "epoch": {
        "train/loss": "train_loss",
        "train/learning_rate": "lr",
        "train/global_batch": "global_batch",
        "train/ranks": "ranks",
        "train/samples_per_second": "samples_per_second",
        "test/accuracy": "test_accuracy",
        "test/loss": "test_loss",
    },
    "decision": {"hessian/eigenvalue": "eigenvalue", "hessian/reference": "reference"},
}
"""By kind of event: tag of the scalar, and the event's field it shows."""


class TensorBoardLog:
    """Follows one run's events into event files of TensorBoard."""

    def __init__(self, run: RunDir) -> None:
        """Nothing is read or written before the first `update`."""
        self._run = run
        self._writer: Any = None
        self._seen = 0

    def update(self) -> None:
        """Write what has been added to the events since the last time."""
        new = self._run.log.read()[self._seen :]
        self._seen += len(new)
        if new and self._writer is None:
            self._writer = _fresh_writer(self._run.tensorboard)
        for event in new:
            self._write(event)
        if new:
            self._writer.flush()

    def close(self) -> None:
        """Bring the files up to date and close them."""
        self.update()
        if self._writer is not None:
            self._writer.close()

    def _write(self, event: Event) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        step, when = event.get("step", 0), event["time"]
        if event["event"] == "phase_start":
            # After a crash TensorBoard drops what the run lost: everything from this step on.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(event_pb2.Event(wall_time=when, step=step, session_log=start))
        values = [
            summary_pb2.Summary.Value(tag=tag, simple_value=event[field])
            for tag, field in SCALARS.get(event["event"], {}).items()
            if event.get(field) is not None
        ]
        if values:
            summary = summary_pb2.Summary(value=values)
            self._writer.add_event(event_pb2.Event(wall_time=when, step=step, summary=summary))


def _fresh_writer(folder: Path) -> Any:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    return EventFileWriter(str(folder))
