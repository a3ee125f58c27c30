"""Event logs as the trainer and the supervisor write them, without any training.

The clock only advances with `tick`, so a test knows where every second of a log went.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

JOB = """\
name = "digits"
seed = 0
[train]
epochs = 8
microbatch = 32
[schedule]
method = "absa"
base_batch = 32
max_batch = 256
alpha = 2.0
[ranks]
initial = 1
max = 4
"""
START = 1_760_000_000.0
EPOCH_SAMPLES = 1600


class Log:
    """Writes a run directory without running anything."""

    def __init__(self, path: Path, job: str | None = JOB) -> None:
        self.path = path
        self.now = START
        self.phase = 0
        self.step = 0
        self.samples = 0
        self.ranks, self.batch, self.lr = 1, 32, 0.05
        self.reference: float | None = None
        path.mkdir(parents=True, exist_ok=True)
        if job is not None:
            (path / "job.toml").write_text(job)

    @property
    def epoch(self) -> float:
        return self.samples / EPOCH_SAMPLES

    def tick(self, seconds: float) -> Log:
        self.now += seconds
        return self

    def event(self, event: str, **fields: Any) -> Log:
        record = {"event": event, "time": self.now, "phase": self.phase, **fields}
        clean = {
            k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()
        }
        with (self.path / "events.jsonl").open("a") as out:
            out.write(json.dumps(clean, ensure_ascii=False) + "\n")
        return self

    def cut_short(self) -> Log:
        """Leave the last line unfinished, as a crash in the middle of a write does."""
        with (self.path / "events.jsonl").open("a") as out:
            out.write('{"event": "epoch", "time": 17')
        return self

    def start(self, **fields: Any) -> Log:
        defaults: dict[str, Any] = {
            "ranks": self.ranks,
            "global_batch": self.batch,
            "lr": self.lr,
            "resumed_from": f"step-{self.step:010d}-phase-{self.phase:03d}.h5"
            if self.step
            else None,
            "step": self.step,
            "samples": self.samples,
            "epoch": self.epoch,
            "hosts": ["node1"],
            "backend": "Horovod over MPI" if self.ranks > 1 else "serial",
            "threads_per_rank": 1,
            "device": "cpu",
        }
        return self.event("phase_start", **{**defaults, **fields})

    def train_epoch(self, accuracy: float = 0.9, seconds: float = 4.0, **fields: Any) -> Log:
        self.step += EPOCH_SAMPLES // self.batch
        self.samples += EPOCH_SAMPLES
        defaults: dict[str, Any] = {
            "epoch": round(self.epoch),
            "step": self.step,
            "samples": self.samples,
            "train_loss": 1.2 / (1 + self.epoch),
            "test_accuracy": accuracy,
            "test_loss": 1.4 / (1 + self.epoch),
            "lr": self.lr,
            "global_batch": self.batch,
            "ranks": self.ranks,
            "samples_per_second": EPOCH_SAMPLES / seconds if seconds else math.nan,
        }
        return self.tick(seconds).event("epoch", **{**defaults, **fields})

    def decide(
        self, eigenvalue: float, *, grow_to: tuple[int, int] | None = None, **fields: Any
    ) -> Log:
        """Compare with the reference; `grow_to` is the next batch and the next ranks."""
        batch, ranks = grow_to or (self.batch, self.ranks)
        compared = eigenvalue if self.reference is None else self.reference
        reason = f"λ {eigenvalue:.3g} against {compared:.3g}: batch {self.batch} → {batch}"
        defaults: dict[str, Any] = {
            "epoch": self.epoch,
            "step": self.step,
            "samples": self.samples,
            "eigenvalue": eigenvalue,
            "residual": 0.004,
            "converged": True,
            "reference": compared,
            "matvecs": 9,
            "hessian_samples": 256,
            "action": "grow" if grow_to else "continue",
            "reason": reason,
            "batch": self.batch,
            "next_batch": batch,
            "ranks": self.ranks,
            "next_ranks": ranks,
            "lr": self.lr,
            "next_lr": self.lr * batch / self.batch,
            "seconds": 0.5,
        }
        self.tick(0.5).event("decision", **{**defaults, **fields})
        if grow_to or self.reference is None:
            self.reference = eigenvalue
        self.lr *= batch / self.batch
        self.next = batch, ranks
        return self

    def save(self, seconds: float = 0.1) -> Log:
        name = f"checkpoints/step-{self.step:010d}-phase-{self.phase:03d}.h5"
        fields = {"path": name, "bytes": 350_000, "seconds": seconds}
        return self.tick(seconds).event(
            "checkpoint", step=self.step, samples=self.samples, **fields
        )

    def end(self, outcome: str, steps: int = 0, **seconds: float) -> Log:
        next_batch, next_ranks = getattr(self, "next", (self.batch, self.ranks))
        self.event(
            "phase_end",
            seconds=seconds,
            outcome=outcome,
            next_ranks=next_ranks,
            step=self.step,
            samples=self.samples,
            epoch=self.epoch,
            steps=steps,
        )
        if outcome in ("resize", "in_place"):
            self.batch, self.ranks = next_batch, next_ranks
            self.phase += 1
        return self

    def rewind(self, step: int, samples: int) -> Log:
        """As a restart from an older checkpoint."""
        self.step, self.samples = step, samples
        return self

    def done(self) -> Log:
        return self.event(
            "done",
            steps=self.step,
            epochs=self.epoch,
            test_accuracy=0.974,
            seconds=self.now - START,
        )


def whole_run(path: Path) -> Log:
    """1 → 2 → 4 ranks, a killed rank, an eigenvalue that is null, and growth in place at the end.

    Wall time 51.1 s: 9.5 in phase 0 (0.5 of it before `phase_start`), 10.8 in phase 1 (2 of them
    resize), 2 of resize, 4.6 kept and 3 lost with the kill, 2.5 until the restart, 9.2 after it,
    9.5 of phase 3.
    """
    log = Log(path)
    log.start().tick(0.5).train_epoch(0.71).decide(42.0)
    log.train_epoch(0.83, seconds=3.5).decide(19.0, grow_to=(64, 2))
    log.end("resize", 100, start=1.0, comp=7.0, hessian=1.0, eval=0.4, data=0.1)
    log.tick(1.8).start().tick(0.2).event("resize", from_ranks=1, to_ranks=2, seconds=2.0)
    log.train_epoch(0.88).decide(math.nan, converged=False).train_epoch(0.91, seconds=3.8)
    log.decide(8.1, grow_to=(128, 4))
    log.end("resize", 50, start=1.9, comp=6.4, comm=0.6, hessian=1.0, eval=0.3, adversarial=0.5)
    log.tick(2.0).start().event("resize", from_ranks=2, to_ranks=4, seconds=2.0)
    log.train_epoch(0.93).decide(6.2, converged=False, residual=0.2).save()
    kept = log.step, log.samples
    log.train_epoch(0.94, seconds=2.5).tick(0.5)
    log.event("failure", reason="killed by signal 9", rank=1, host="node1", exit_code=137)
    log.rewind(*kept).tick(2.5).start().tick(0.2)
    log.train_epoch(0.945).decide(3.9, grow_to=(256, 4)).tick(4.5)
    log.end("in_place", 14, start=2.6, comp=7.5, comm=0.8, hessian=0.5, data=0.2)
    log.start(resumed_from=None)
    log.train_epoch(0.968).decide(math.nan, matvecs=0, hessian_samples=0)
    log.train_epoch(0.974, seconds=5.0).save(0.0)
    return log.end("done", 13, comp=8.0, comm=0.7, eval=0.3, checkpoint=0.2).done()
