"""An explicit list of batches."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal, Self

from hpc_absa.errors import UsageError
from hpc_absa.records import Decision, Observation, ScheduleState
from hpc_absa.schedules.base import EXPONENTS, BuiltInSchedule, LrRule, TrainSettings

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_ENTRY = re.compile(r"(?P<number>\d+(\.\d+)?)(?P<unit>[KMBTe]?):(?P<batch>[1-9]\d*)")


@dataclass(frozen=True)
class Entry:
    """A batch and where it begins."""

    batch: int
    epochs: float | None
    samples: float | None
    """One of the two is None."""

    def epoch(self, samples: int | None) -> float:
        """Where it begins, with so many training samples."""
        if self.epochs is not None:
            return self.epochs
        assert self.samples is not None
        if not self.samples:
            return 0.0
        if samples is None:
            raise UsageError(
                f"schedule.batches: {self.samples:.15g} samples: the number of training samples is "
                "not known here; expected epochs, such as 30e:256"
            )
        return self.samples / samples


def parse(batches: str) -> list[Entry]:
    """The entries of `schedule.batches`; raises ValueError."""
    entries = []
    for word in batches.split():
        match = _ENTRY.fullmatch(word)
        if not match:
            raise ValueError(
                f"batches: {word!r}: expected FROM:BATCH, such as 0:64, 1.5M:128 or 30e:256"
            )
        number, unit = Decimal(match["number"]), match["unit"]  # 16.1 · 1000 is 16100.000000000002
        place = (float(number), None) if unit == "e" else (None, float(number * UNITS[unit]))
        entries.append(Entry(int(match["batch"]), *place))
    for first, second in itertools.pairwise(entries):
        if second.batch <= first.batch:
            raise ValueError(
                f"batches: {first.batch} and then {second.batch}: expected increasing batches"
            )
    return entries


class Steps(BuiltInSchedule):
    """Steps: an explicit list of batches, each from so many samples or epochs on.

    The form is that of `--step-batch-size-schedule` in Megatron-LM (pull request 3779). A batch
    applies from the first boundary (end of an epoch, decision point) at or after its threshold.
    """

    method: Literal["steps"] = "steps"
    """`steps`."""
    batches: str = ""
    """`FROM:BATCH` with spaces in between, `"0:64 1.5M:128 30e:256"`: `FROM` in samples (K, M, B, T
    are 10³ to 10¹²) or, with `e`, in epochs. A batch above `max_batch` is cut to it."""
    lr_rule: LrRule = "none"
    """As for all; in Megatron-LM the learning rate does not follow the batch."""

    @property
    def largest_batch(self) -> int:
        """`max_batch`, or the largest of the list."""
        return self.max_batch or max([self.base_batch, *(e.batch for e in parse(self.batches))])

    def check(self, train: TrainSettings) -> None:
        super().check(train)
        for entry in parse(self.batches):
            if entry.batch % train.microbatch:
                raise ValueError(
                    f"schedule.batches: {entry.batch}: expected a multiple of train.microbatch = "
                    f"{train.microbatch}"
                )
            at_start = not (entry.epochs or entry.samples)
            if entry.batch < self.base_batch or (at_start and entry.batch != self.base_batch):
                raise ValueError(
                    f"schedule.batches: {entry.batch}: expected schedule.base_batch = "
                    f"{self.base_batch} at the start, and larger batches later"
                )

    def bind(self, train: TrainSettings, seed: int = 0, samples: int | None = None) -> Self:
        bound = super().bind(train, seed, samples)
        if samples is not None and (starts := bound._starts()) != sorted(starts):
            raise UsageError(
                f"schedule.batches = {self.batches!r}: expected increasing thresholds (one epoch "
                f"is {samples} samples)"
            )
        return bound

    def _starts(self) -> list[tuple[float, int]]:
        """Where each batch begins, in epochs; raises a UsageError if that is not known."""
        return [(entry.epoch(self._samples), entry.batch) for entry in parse(self.batches)]

    def decide(self, state: ScheduleState, seen: Observation) -> Decision:
        after, milestone = self._train.multi_step_lr.apply(state, seen)
        due = [(start, batch) for start, batch in self._starts() if start <= seen.epoch]
        batch = min(due[-1][1], self.largest_batch) if due else self.base_batch
        if batch <= state.global_batch:
            return Decision("continue", milestone or "no further batch is due", after)
        lr = after.lr * (batch / state.global_batch) ** EXPONENTS[self.lr_rule]
        reason = f"batch {batch} from epoch {due[-1][0]:.6g}: batch {state.global_batch} → {batch}"
        return Decision(
            "grow",
            "; ".join(filter(None, [reason, milestone])),
            replace(after, global_batch=batch, lr=lr),
            "schedule",
        )

    def unchanged(self, state: ScheduleState, epoch: float, growing: bool) -> tuple[float, float]:
        points, until = super().unchanged(state, epoch, growing)
        left = (
            s for s, batch in self._starts() if min(batch, self.largest_batch) > state.global_batch
        )
        return points, min([until, *left])
