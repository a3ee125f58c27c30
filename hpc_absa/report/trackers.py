"""The measurements of runs for Weights & Biases and for trackio: a folder, without a network."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpc_absa.errors import UsageError
from hpc_absa.report.curves import groups
from hpc_absa.report.history import History
from hpc_absa.report.scalars import rows

PROJECT = "hpc-absa"
OWN = ("event", "step", "time")
"""Columns that trackers have under these names themselves, or not as numbers."""


def require(tracker: str) -> None:
    """
    Raises:
        UsageError: the tracker's package is not installed.
    """
    if importlib.util.find_spec(tracker) is None:
        raise UsageError(
            f"--{tracker}: {tracker} is not installed: pip install 'hpc-absa[{tracker}]'"
        )


def write(tracker: str, histories: Mapping[str, History], folder: Path) -> None:
    """Write a run of the tracker for each of ours, by name, into `folder`.

    `wandb sync FOLDER/wandb/offline-run-*` uploads them later; `TRACKIO_DIR=FOLDER trackio show`
    shows them.

    Raises:
        UsageError: as `require`.
    """
    require(tracker)
    folder.mkdir(parents=True, exist_ok=True)
    own: dict[str, Any] = {"dir": str(folder), "mode": "offline"}
    if tracker == "trackio":
        os.environ["TRACKIO_DIR"] = str(folder)  # read at its import
        own = {"embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    module = importlib.import_module(tracker)
    names = groups(histories)
    for name, history in histories.items():
        config = dict(history.job)
        module.init(project=PROJECT, name=name, group=names[name], config=config, **own)
        for row in rows(history):
            numbers = {key: value for key, value in row.items() if key not in OWN}
            module.log(numbers, step=int(float(row.get("step", 0))))
        module.finish()
