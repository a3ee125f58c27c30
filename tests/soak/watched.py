"""A network for the campaigns that also writes down what its rank does.

The job's `model.name` loads it into every rank, so the product needs no hook: building the model
wraps the functions in which a rank's moments of work begin. With `HPC_ABSA_WATCHED` set to a
folder, every rank appends JSON lines to a file of its own there: `start`, its `moment`s, and for
each optimizer step a `step` with the samples that it drew, written before the ranks add up their
gradients: no rank can complete a step that is not in all ranks' ledgers.

With `HPC_ABSA_HOLD` set to `MOMENT:RANK:TIME`, that rank stands still when it comes to the moment
for that time (from 1), until the file `released` exists: a test can then act in the middle of it.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from hpc_absa.adversarial import fgsm
from hpc_absa.checkpoint import file
from hpc_absa.models import small
from hpc_absa.training import loop, reduction
from hpc_absa.training.step import Stepper

FOLDER, HOLD = "HPC_ABSA_WATCHED", "HPC_ABSA_HOLD"
PATIENCE = 60.0
"""Seconds that a held rank waits before it goes on by itself."""


def network(channels: int, classes: int) -> nn.Module:
    """The digits network, watched where the environment asks for it."""
    if folder := os.environ.get(FOLDER):
        Watcher(Path(folder)).attach()
    return small.digits_cnn(channels, classes, 8)


class Watcher:
    """What one rank of one world does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
        world = os.environ.get("PMIX_NAMESPACE", os.getpid())
        path = folder / f"world-{world}-rank-{self._rank}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._hold = os.environ.get(HOLD)
        self._times: Counter[str] = Counter()
        self._step = 0
        self._visits: list[tuple[int, int]] | None = None
        self._note("start", pid=os.getpid())

    def attach(self) -> None:
        """Wrap the functions in which the moments begin; building the model is the first."""
        self._moment("start")
        Stepper.take = self._taking(Stepper.take)  # type: ignore[method-assign]
        for kind in (reduction.Reproducible, reduction.Overlapped):
            kind.finish = self._finishing(kind.finish)  # type: ignore[attr-defined]
        for place, name, moment in (
            (fgsm, "perturb", "adversarial"),
            (loop, "estimate", "hessian"),
            (loop, "evaluate", "evaluation"),
            (file, "write", "saving"),
        ):
            setattr(place, name, self._announcing(getattr(place, name), moment))

    def _announcing(self, function: Callable[..., Any], moment: str) -> Callable[..., Any]:
        def announced(*args: Any, **kwargs: Any) -> Any:
            self._moment(moment)
            return function(*args, **kwargs)

        return announced

    def _taking(self, take: Callable[..., Any]) -> Callable[..., Any]:
        def watched(stepper: Stepper, microbatches: range, feed: Any, **rest: Any) -> Any:
            self._moment("step")
            self._step, self._visits = rest["steps_before"] + 1, []
            return take(stepper, microbatches, self._drawn(feed), **rest)

        return watched

    def _drawn(self, feed: Any) -> Any:
        for microbatch in feed:
            pairs = zip(microbatch.epochs.tolist(), microbatch.samples.tolist(), strict=True)
            assert self._visits is not None
            self._visits.extend(pairs)
            yield microbatch

    def _finishing(self, finish: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            if self._visits is not None:
                self._note("step", step=self._step, visits=self._visits)
                self._visits = None
            return finish(*args)

        return watched

    def _moment(self, moment: str) -> None:
        self._note("moment", moment=moment)
        self._times[moment] += 1
        here = f"{moment}:{self._rank}:{self._times[moment]}"
        if self._hold != here or (self._folder / "held").exists():
            return
        (self._folder / "held").write_text(str(os.getpid()))
        until = time.monotonic() + PATIENCE
        while not (self._folder / "released").exists() and time.monotonic() < until:
            time.sleep(0.005)

    def _note(self, kind: str, **fields: Any) -> None:
        """One line in one write: a kill leaves whole lines."""
        line = json.dumps({"kind": kind, "time": time.time(), **fields}) + "\n"
        os.write(self._file, line.encode())
