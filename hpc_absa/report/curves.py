"""The curves of the page as JSON: what its script draws, for one run or several."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hpc_absa.report.history import Decision, History, job_table
from hpc_absa.report.scalars import Row, rows
from hpc_absa.report.timing import finite

AXES = {
    "epoch": "epochs",
    "step": "SGD iterations",
    "seconds": "time",
    "rank_hours": "rank-hours",
}
"""What curves can be drawn over, by the column of `scalars.rows`."""

PROGRESS_POINTS = 12_000
"""Progress events on a page, all runs together; on longer logs neighbours are merged."""
MERGED = {"train_loss": "mean", "samples_per_second": "mean", "grad_norm": "max", "memory": "max"}
"""How neighbouring progress events are merged; of other fields the last value counts."""


@dataclass(frozen=True)
class Panel:
    title: str
    fields: Mapping[str, str]
    """Columns of `scalars.rows` and the names of their curves."""
    scale: str = "linear"
    """Of the values, unless the reader chooses: `linear`, `log` or `log2`."""
    steps: bool = False
    """Whether a value holds until the next one."""
    factor: float = 1.0
    """That the values are multiplied with."""


PANELS = {
    "loss": Panel("Loss", {"train_loss": "train", "test_loss": "test"}, "log"),
    "accuracy": Panel("Test accuracy, %", {"test_accuracy": "test accuracy"}, factor=100),
    "batch": Panel(
        "Global batch, samples per step", {"global_batch": "global batch"}, "log2", steps=True
    ),
    "ranks": Panel("Ranks (MPI processes)", {"ranks": "ranks"}, "log2", steps=True),
    "lr": Panel("Learning rate", {"lr": "learning rate"}, steps=True),
    "eigenvalue": Panel("Top Hessian eigenvalue λ", {"eigenvalue": "λ"}, "log"),
    "noise": Panel("Gradient noise scale, samples", {"noise_scale": "noise scale"}, "log"),
    "speed": Panel("Throughput, samples/s", {"samples_per_second": "throughput"}),
    "grad_norm": Panel("Gradient norm", {"grad_norm": "gradient norm"}, "log"),
    "memory": Panel("Memory of rank 0, GB", {"memory": "memory"}, factor=1e-9),
}


@dataclass
class Curves:
    """What the page's script draws of one run; indices are positions in `x`."""

    name: str
    group: str
    """Runs of one group differ in their seed only."""
    state: str
    x: dict[str, list[float | None]] = field(default_factory=dict)
    """By axis: the position of each row."""
    y: dict[str, tuple[list[int], list[float | None]]] = field(default_factory=dict)
    """By column: indices and values."""
    marks: dict[str, list[int]] = field(default_factory=dict)
    """Rows of decisions by what is special about them: `grow`, `bound`, `unconverged`."""
    threshold: tuple[list[int], list[float | None]] = field(default_factory=lambda: ([], []))
    phases: list[int] = field(default_factory=list)
    """Rows at which phases begin."""
    failures: list[int] = field(default_factory=list)
    """Rows that follow a failure."""


def curves(histories: Mapping[str, History], states: Mapping[str, str]) -> dict[str, Any]:
    """By name of the run; `states` are the states of runs, by name."""
    names = groups(histories)
    runs = [
        _of_run(name, names[name], states.get(name, ""), history, PROGRESS_POINTS // len(histories))
        for name, history in histories.items()
    ]
    panels = {key: asdict(panel) for key, panel in PANELS.items()}
    metrics = {column for run in runs for column in run.y if column.startswith("metrics.")}
    for column in sorted(metrics - {"metrics.accuracy"}):  # which is `test_accuracy`
        title = column.removeprefix("metrics.")
        panels[column] = asdict(Panel(f"Test {title}", {column: title}))
    losses = [x for run in runs for k in PANELS["loss"].fields for x in run.y.get(k, ((), ()))[1]]
    if any(loss is not None and loss < 0 for loss in losses):  # such as of a log-likelihood
        panels["loss"]["scale"] = "linear"
    known = {column for panel in panels.values() for column in panel["fields"]}
    for run in runs:
        run.y = {column: values for column, values in run.y.items() if column in known}
    return {"axes": AXES, "panels": panels, "runs": [vars(run) for run in runs]}


def to_json(content: Mapping[str, Any]) -> str:
    """For a script element: no text of the user's can end it."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def groups(histories: Mapping[str, History]) -> dict[str, str]:
    """The group of each run, by name: runs whose jobs differ in seed and name only."""
    members: dict[str, list[str]] = {}
    for name, history in histories.items():
        job = {k: v for k, v in history.job.items() if k not in ("name", "seed")}
        key = json.dumps(job, sort_keys=True, default=str) if job else name
        members.setdefault(key, []).append(name)
    found: dict[str, str] = {}
    for some in members.values():
        title = re.sub(r"[\s._-]*seed[\s=_-]?\d+", "", some[0]) if len(some) > 1 else some[0]
        found |= dict.fromkeys(some, title or some[0])
    return found


def _of_run(name: str, group: str, state: str, history: History, limit: int) -> Curves:
    table = _thinned(rows(history), max(limit, 100))
    run = Curves(name, group, state)
    run.x = {axis: [_short(finite(row.get(axis))) for row in table] for axis in AXES}
    for panel in PANELS.values():
        for column in panel.fields:
            indices = chosen(table, column)
            if panel.steps:
                indices = _changes(indices, [table[i][column] for i in indices])
            if indices:
                values = [_short(finite(table[i][column]) * panel.factor) for i in indices]
                run.y[column] = indices, values
    for column in {key for row in table for key in row if key.startswith("metrics.")}:
        indices = [i for i, row in enumerate(table) if column in row]
        run.y[column] = indices, [_short(finite(table[i][column])) for i in indices]
    _decisions(run, table, history)
    run.phases = [i for i, row in enumerate(table) if row["event"] == "phase_start"]
    times = [finite(row["time"]) for row in table]
    for failure in history.interruptions:
        after = next((i for i, time in enumerate(times) if time > failure.time), len(times) - 1)
        run.failures.append(max(0, after))
    return run


def chosen(table: Sequence[Row], column: str) -> list[int]:
    """The rows with a curve's values.

    An epoch's mean of loss or speed is only drawn where the log has no finer values.
    """
    by_kind: dict[str, list[int]] = {}
    for i, row in enumerate(table):
        if column in row:
            by_kind.setdefault(str(row["event"]), []).append(i)
    if column in ("train_loss", "samples_per_second"):
        progress, epochs = by_kind.get("progress", []), by_kind.get("epoch", [])
        return progress if len(progress) > len(epochs) else epochs
    if column == "lr":  # a decision's is the one before warm-up
        by_kind.pop("decision", None)
    return sorted(i for some in by_kind.values() for i in some)


def _changes(indices: Sequence[int], values: Sequence[Any]) -> list[int]:
    """Without those between two equal values."""
    last = len(indices) - 1
    return [
        index
        for n, index in enumerate(indices)
        if n in (0, last) or values[n] != values[n - 1] or values[n] != values[n + 1]
    ]


def _decisions(run: Curves, table: Sequence[Row], history: History) -> None:
    """Marks of eigenvalues, and the threshold that they are compared with."""
    by_epoch = {decision.epoch: decision for decision in history.decisions}
    alpha = finite(job_table(history.job, "schedule").get("alpha"), 0.0) or 1.0
    indices, values = [], []
    for i, row in enumerate(table):
        decision = by_epoch.get(finite(row["epoch"])) if row["event"] == "decision" else None
        if decision is None or not decision.matvecs > 0:
            continue
        run.marks.setdefault(_mark(decision), []).append(i)
        if decision.reference > 0:
            indices.append(i)
            values.append(_short(decision.reference / alpha))
    run.threshold = indices, values


def _mark(decision: Decision) -> str:
    if decision.action == "grow":
        return "grow"
    if decision.stopped_above_threshold:
        return "bound"
    return "estimate" if decision.converged else "unconverged"


def _thinned(table: Sequence[Row], limit: int) -> list[Row]:
    """At most about `limit` rows of progress, and of epochs; every decision and phase."""
    for kind in ("progress", "epoch"):
        count = sum(row["event"] == kind for row in table)
        if count > limit:
            table = list(_merged(table, kind, math.ceil(count / limit)))
    return list(table)


def _merged(table: Iterable[Row], kind: str, size: int) -> Iterable[Row]:
    """Each `size` neighbouring rows of one kind as one, not across rows of another kind."""
    bucket: list[Row] = []
    for row in table:
        if row["event"] != kind:
            if bucket and row["event"] == "phase_start":
                yield _merge(bucket)
                bucket = []
            yield row
            continue
        bucket.append(row)
        if len(bucket) == size:
            yield _merge(bucket)
            bucket = []
    if bucket:
        yield _merge(bucket)


def _merge(bucket: Sequence[Row]) -> Row:
    merged = dict(bucket[-1])
    for name, how in MERGED.items():
        values = [float(row[name]) for row in bucket if name in row]
        if values:
            merged[name] = max(values) if how == "max" else sum(values) / len(values)
    return merged


def _short(value: float) -> float | None:
    """Six significant digits: the page is a drawing, `export` has all."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
