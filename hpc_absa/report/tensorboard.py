"""`D/tensorboard`: the events of a run as TensorBoard scalars, updated while it runs.

Everything is derived from `events.jsonl`: a restarted supervisor writes these files again from the
beginning, so that nothing is counted twice.
"""

from __future__ import annotations

import math
from typing import Any

from hpc_absa.report.timing import finite
from hpc_absa.rundir import RunDir
from hpc_absa.rundir.events import Event
from hpc_absa.rundir.paths import TENSORBOARD_SUFFIX

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
    "progress": {
        "progress/train_loss": "train_loss",
        "progress/samples_per_second": "samples_per_second",
        "progress/grad_norm": "grad_norm",
        "progress/memory": "memory",
    },
    "decision": {"hessian/eigenvalue": "eigenvalue", "hessian/reference": "reference"},
}
"""By kind of event: the tag of each scalar, and the event's field with its value."""


class TensorBoardLog:
    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._writer: Any = None
        self._written = 0

    def update(self) -> None:
        """Write the events added since the last call."""
        new = self._run.log.read()[self._written :]
        self._written += len(new)
        if new and self._writer is None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            for old in self._run.tensorboard.glob(f"events.out.tfevents.*{TENSORBOARD_SUFFIX}"):
                old.unlink()
            folder = str(self._run.tensorboard)
            self._writer = EventFileWriter(folder, filename_suffix=TENSORBOARD_SUFFIX)
        for event in new:
            self._write(event)
        if new:
            self._writer.flush()

    def close(self) -> None:
        self.update()
        if self._writer is not None:
            self._writer.close()

    def _write(self, event: Event) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2

        step, time = int(finite(event.get("step"), 0.0)), finite(event.get("time"), 0.0)
        if event["event"] == "phase_start":
            # After a crash TensorBoard drops what the run lost: everything from this step on.
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._writer.add_event(event_pb2.Event(wall_time=time, step=step, session_log=start))
        values = [
            summary_pb2.Summary.Value(tag=tag, simple_value=value)
            for tag, field in SCALARS.get(event["event"], {}).items()
            if math.isfinite(value := finite(event.get(field)))
        ]
        if values:
            summary = summary_pb2.Summary(value=values)
            self._writer.add_event(event_pb2.Event(wall_time=time, step=step, summary=summary))
