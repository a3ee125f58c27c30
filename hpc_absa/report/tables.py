"""The talk's two tables, measured and published."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hpc_absa.report import text
from hpc_absa.report.history import History
from hpc_absa.report.published import (
    PUBLISHED_ACCURACY,
    PUBLISHED_IMAGENET,
    PUBLISHED_TIMES,
    SCHEDULE_NAMES,
)
from hpc_absa.report.table import Cell, Column, Measured, Table

TALK_CATEGORIES = {"comp": "comp", "comm": "comm", "resize": "resize", "hessian": "Hessian"}


@dataclass(frozen=True)
class RunResult:
    """What one run of a sweep came to."""

    schedule: str
    """As in the job file: `bl`, `fb`, ..."""
    max_batch: int
    """Largest global batch that the schedule may reach."""
    seed: int
    accuracy: float
    """Test accuracy, a fraction of one; NaN where the run failed."""
    iterations: float
    """Optimizer steps; NaN where the run failed."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """By category of `accounting.CATEGORIES`."""
    wall: float = math.nan


def run_result(history: History, max_batch: int, seed: int) -> RunResult:
    """What a run came to, for the tables; NaN for accuracy and iterations unless it is done."""
    done = history.done is not None
    return RunResult(
        schedule=history.method,
        max_batch=max_batch,
        seed=seed,
        accuracy=history.test_accuracy if done else math.nan,
        iterations=history.steps if done else math.nan,
        seconds=history.seconds,
        wall=history.wall,
    )


def published_results() -> list[RunResult]:
    """The talk's accuracy table as results, one without a seed for each of its cells."""
    return [
        RunResult(schedule, batch, 0, accuracy / 100, iterations)
        for batch, row in PUBLISHED_ACCURACY.items()
        for schedule, (accuracy, iterations) in row.items()
    ]


def accuracy_table(
    results: Iterable[RunResult],
    *,
    published: bool = False,
    title: str = "Test accuracy and SGD iterations",
) -> Table:
    """Accuracy in percent and optimizer steps by schedule and (maximum) batch size.

    Args:
        results: Any number of seeds a cell; NaN ones are left out of the means and told of.
        published: Put the talk's row under each batch size that it has, and its other rows too.
        title: Caption.
    """
    measured = list(results)
    sources = [("", measured)]
    if published:
        sources = [("measured", measured), ("published", published_results())]
    everything = [result for _, some in sources for result in some]
    schedules = _in_order(result.schedule for result in everything)
    columns = [Column("batch")] + ([Column("source")] if published else [])
    for schedule in schedules:
        group = schedule_name(schedule)
        columns += [Column("accuracy %", group, 2), Column("# iter", group, 0)]
    rows: list[tuple[Cell, ...]] = []
    for batch in sorted({result.max_batch for result in everything}):
        for source, some in sources:
            here = [result for result in some if result.max_batch == batch]
            if here:
                cells = [cell for name in schedules for cell in _accuracy_cells(here, name)]
                rows.append((batch, *([source] if published else []), *cells))
    return Table(title, tuple(columns), tuple(rows), _accuracy_note(measured))


def time_table(
    results: Iterable[RunResult],
    *,
    baseline: str | None = "bl",
    label: Callable[[RunResult], str] | None = None,
    published: bool = False,
    title: str = "Where the time went, seconds",
) -> Table:
    """Seconds by schedule in the talk's columns, means over the runs that share a label.

    Args:
        results: Runs with their seconds; those without any are left out.
        baseline: Label (or schedule) that the speed-up is against; the first row where it is not
            among the results; None leaves the column out.
        label: What a row is about; by default the schedule.
        published: The talk's rows follow, with speed-ups against the talk's own baseline.
        title: Caption.
    """
    name = label or (lambda result: schedule_name(result.schedule))
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        if result.seconds:
            groups.setdefault(name(result), []).append(result)
    means = {row: _mean_seconds(some) for row, some in groups.items()}
    extra = _extra_categories(means.values())
    columns = [Column("method"), *(Column(head, digits=1) for head in TALK_CATEGORIES.values())]
    columns += [Column(head, digits=1) for head in extra.values()]
    columns += [Column("total", digits=1)]
    columns += [Column("speed-up", digits=2, suffix="×")] if baseline is not None else []
    wanted = schedule_name(baseline or "")
    walls = {row: summary([result.wall for result in some]) for row, some in groups.items()}
    rows = _time_rows(means, walls, wanted, extra, baseline is not None)
    if published:
        rows += _published_times(extra, baseline is not None)
    notes = [_time_note(extra), _imagenet_note() if published else ""]
    return Table(title, tuple(columns), tuple(rows), " ".join(filter(None, notes)))


def published_time_table() -> Table:
    """The talk's time table, its speed-ups computed from its own totals."""
    return time_table(
        [
            RunResult(schedule, 0, 0, math.nan, math.nan, seconds, sum(seconds.values()))
            for schedule, seconds in PUBLISHED_TIMES.items()
        ],
        title="Where the time went, seconds (ResNet-18 on ImageNet, as published)",
    )


def schedule_name(schedule: str) -> str:
    """`ABSA tuned` of `absa-tuned`, and of `absa r = 0.4` the label as it is: `ABSA r = 0.4`."""
    method, _, label = schedule.partition(" ")
    return f"{SCHEDULE_NAMES.get(method, method)} {label}".strip()


def summary(values: Sequence[float]) -> Measured | None:
    """Mean and sample standard deviation of the finite values; None without any."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    spread = statistics.stdev(known) if len(known) > 1 else math.nan
    return Measured(statistics.fmean(known), spread, len(known))


def _accuracy_cells(results: Sequence[RunResult], schedule: str) -> tuple[Cell, Cell]:
    mine = [result for result in results if result.schedule == schedule]
    accuracy = summary([100 * result.accuracy for result in mine])
    return accuracy, summary([result.iterations for result in mine])


def _accuracy_note(measured: Sequence[RunResult]) -> str:
    seeds = sorted({result.seed for result in measured})
    failed = sum(not math.isfinite(result.accuracy) for result in measured)
    said = [f"Mean ± sample standard deviation over {len(seeds)} seeds."] if len(seeds) > 1 else []
    said += [f"{text.plural(failed, 'run')} without a result not included."] if failed else []
    return " ".join(said)


def _in_order(schedules: Iterable[str]) -> list[str]:
    known = list(SCHEDULE_NAMES)
    rank = {name: i for i, name in enumerate(known)}
    return sorted(set(schedules), key=lambda name: (rank.get(name.split(" ")[0], len(known)), name))


def _mean_seconds(results: Sequence[RunResult]) -> dict[str, float]:
    keys = {key: None for result in results for key in result.seconds}
    return {k: statistics.fmean(r.seconds.get(k, 0.0) for r in results) for k in keys}


def _extra_categories(means: Iterable[Mapping[str, float]]) -> dict[str, str]:
    """Columns beyond the talk's, where there is anything to put into them."""
    used = {key for seconds in means for key, value in seconds.items() if value > 0}
    extra = {"adversarial": "adversarial"} if "adversarial" in used else {}
    if used - set(TALK_CATEGORIES) - {"adversarial"}:
        extra["rest"] = "rest"
    return extra


def _time_rows(
    means: Mapping[str, Mapping[str, float]],
    walls: Mapping[str, Measured | None],
    baseline: str,
    extra: Mapping[str, str],
    speed_up: bool,
) -> list[tuple[Cell, ...]]:
    totals = {row: wall.mean if wall else sum(means[row].values()) for row, wall in walls.items()}
    against = totals.get(baseline, next(iter(totals.values()), math.nan))
    rows: list[tuple[Cell, ...]] = []
    for row, seconds in means.items():
        cells: list[Cell] = [seconds.get(key) or None for key in TALK_CATEGORIES]
        rest = totals[row] - sum(seconds.get(k, 0.0) for k in (*TALK_CATEGORIES, "adversarial"))
        cells += [seconds.get("adversarial") if key == "adversarial" else rest for key in extra]
        cells.append(walls[row] or totals[row])
        cells += [against / totals[row] if totals[row] else None] if speed_up else []
        rows.append((row, *cells))
    return rows


def _published_times(extra: Mapping[str, str], speed_up: bool) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for row in published_time_table().rows:
        blank = [None] * len(extra)
        rows.append((f"{row[0]}, published", *row[1:5], *blank, *row[5 : 7 if speed_up else 6]))
    return rows


def _imagenet_note() -> str:
    told = [
        f"{schedule_name(name)} {iterations // 1000}k iterations"
        + (f", {accuracy} %" if accuracy else "")
        for name, (accuracy, iterations) in PUBLISHED_IMAGENET.items()
    ]
    return f"Published beside the times: {'; '.join(told)}."


def _time_note(extra: Mapping[str, str]) -> str:
    if "rest" not in extra:
        return ""
    return "rest: data, evaluation, checkpoints, start, losses to failures, other."
