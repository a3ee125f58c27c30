"""A network for the campaigns that also records what its rank does.

The job's `model.name` loads it into every rank, so the package needs no hook: building the model
wraps the functions that start a rank's moments (step, evaluation, saving, ...). With
`HPC_ABSA_WATCHED` set to a folder, every rank appends JSON lines to a separate file there: `start`,
its `moment`s, and for each optimizer step a `step` with its samples, written before the ranks sum
their gradients: no rank can complete a step that is not in all ranks' ledgers.

With `HPC_ABSA_HOLD` set to `MOMENT:RANK:COUNT`, that rank waits at the COUNT-th time (from 1) that
it comes to the moment, until the file `released` exists: a test can then act in the middle of it.
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
from hpc_absa.data.loader import Loader, Microbatch
from hpc_absa.models import small
from hpc_absa.training import estimator, trainer
from hpc_absa.training.reduction import (
    LocalReduction,
    OverlappedReduction,
    ReproducibleReduction,
)
from hpc_absa.training.run import Run
from hpc_absa.training.step import TrainStep

FOLDER, HOLD = "HPC_ABSA_WATCHED", "HPC_ABSA_HOLD"
HOLD_SECONDS = 60.0
"""Seconds that a held rank waits before it continues by itself."""
ANNOUNCED = (
    (fgsm, "perturb", "adversarial"),
    (estimator, "estimate_eigenvalue", "hessian"),
    (trainer, "evaluate", "evaluation"),
    (file, "write", "saving"),
)
"""Module, name of the function in it, moment that the function begins."""


def network(channels: int, classes: int) -> nn.Module:
    """The digits network, watched where the environment asks for it."""
    if folder := os.environ.get(FOLDER):
        Watcher(Path(folder)).attach()
    return small.DigitsCNN(channels, classes, 8)


class Watcher:
    """What one rank of one launch does."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
        launch = os.environ.get("PMIX_NAMESPACE", os.getpid())
        path = folder / f"launch-{launch}-rank-{self._rank}.jsonl"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._hold = os.environ.get(HOLD)
        self._times: Counter[str] = Counter()
        self._step = 0
        self._visits: list[tuple[int, int]] | None = None
        self._note("start", pid=os.getpid())

    def attach(self) -> None:
        """Wrap the functions in which the moments begin; building the model is the first."""
        self._moment("start")
        Run.begin_step = self._beginning(Run.begin_step)  # type: ignore[method-assign]
        Loader.get = self._loading(Loader.get)  # type: ignore[method-assign]
        for kind in (LocalReduction, OverlappedReduction, ReproducibleReduction):
            kind.finish = self._finishing(kind.finish)  # type: ignore[attr-defined]
        for module, name, moment in ANNOUNCED:
            setattr(module, name, self._announcing(getattr(module, name), moment))

    def _announcing(self, function: Callable[..., Any], moment: str) -> Callable[..., Any]:
        def announced(*args: Any, **kwargs: Any) -> Any:
            self._moment(moment)
            return function(*args, **kwargs)

        return announced

    def _beginning(self, begin: Callable[..., TrainStep]) -> Callable[..., TrainStep]:
        def watched(run: Run, *args: Any) -> TrainStep:
            self._moment("step")
            self._step, self._visits = run.state.progress.position.step + 1, []
            return begin(run, *args)

        return watched

    def _loading(self, get: Callable[..., Microbatch]) -> Callable[..., Microbatch]:
        def watched(*args: Any, **kwargs: Any) -> Microbatch:
            microbatch = get(*args, **kwargs)
            assert self._visits is not None
            pairs = zip(microbatch.epochs.tolist(), microbatch.samples.tolist(), strict=True)
            self._visits.extend(pairs)
            return microbatch

        return watched

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
        until = time.monotonic() + HOLD_SECONDS
        while not (self._folder / "released").exists() and time.monotonic() < until:
            time.sleep(0.005)

    def _note(self, kind: str, **fields: Any) -> None:
        """One line in one write: a kill leaves complete lines."""
        line = json.dumps({"kind": kind, "time": time.time(), **fields}) + "\n"
        os.write(self._file, line.encode())
