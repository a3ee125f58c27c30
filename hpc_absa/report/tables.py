"""Tables in four formats, and the talk's two tables, measured and published."""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from hpc_absa.report import format as fmt
from hpc_absa.report.history import History
from hpc_absa.report.published import (
    PUBLISHED_ACCURACY,
    PUBLISHED_IMAGENET,
    PUBLISHED_TIMES,
    SCHEDULE_NAMES,
)

TALK_CATEGORIES = {"comp": "comp", "comm": "comm", "resize": "resize", "hessian": "Hessian"}

MORE_CATEGORIES = ("adversarial", "diagonal")
"""Columns that the talk does not have, where there is anything to put into them."""


@dataclass(frozen=True)
class Measured:
    """A mean over repetitions, with the sample standard deviation of at least two."""

    mean: float
    std: float = math.nan
    n: int = 1


Cell = str | int | float | Measured | None
"""None and NaN are shown empty: not measured, or not applicable."""


@dataclass(frozen=True)
class Column:
    name: str
    group: str = ""
    """Adjacent columns with the same group share a heading."""
    digits: int | None = None
    """Digits after the point; None writes text and integers as they are."""
    suffix: str = ""
    """Written after each number, such as `×`."""

    @property
    def heading(self) -> str:
        return f"{self.group} {self.name}".strip()

    def format(self, cell: Cell) -> str:
        if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
            return ""
        if isinstance(cell, str):
            return cell
        if not isinstance(cell, Measured):
            return self._digits(cell) + self.suffix
        spread = ""
        if cell.n > 1 and (cell.std > 0 or self.digits != 0):
            spread = f" ± {self._digits(cell.std)}"
        return self._digits(cell.mean) + spread + self.suffix

    def _digits(self, value: float) -> str:
        return str(value) if self.digits is None else f"{value:.{self.digits}f}"


@dataclass(frozen=True)
class Table:
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    sortable: bool = False
    """Whether a reader of the page can sort it."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {len(row)} cells under {len(self.columns)} columns")

    @property
    def formatted(self) -> list[list[str]]:
        return [
            [column.format(cell) for column, cell in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    @property
    def numeric(self) -> list[bool]:
        """Whether each column has numbers, which are aligned right."""
        return [
            not any(isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))
        ]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The group headings and the columns that each one spans; empty without any."""
        runs = itertools.groupby(column.group for column in self.columns)
        groups = [(group, len(list(columns))) for group, columns in runs]
        return groups if any(group for group, _ in groups) else []

    def to_markdown(self) -> str:
        """GitHub's dialect: numbers aligned right, groups folded into the headings."""
        heads = [_markdown(column.heading) for column in self.columns]
        rules = ["--:" if numeric else ":--" for numeric in self.numeric]
        body = [map(_markdown, row) for row in self.formatted]
        lines = [f"| {' | '.join(row)} |\n" for row in (heads, rules, *body)]
        note = f"\n{_markdown(self.note)}\n" if self.note else ""
        return f"**{_markdown(self.title)}**\n\n{''.join(lines)}{note}"

    def to_csv(self) -> str:
        """Full precision; a mean over repetitions is followed by its `std` and `n`."""
        columns: list[list[object]] = []
        for column, *cells in zip(self.columns, *self.rows, strict=True):
            columns.append([column.heading, *(getattr(cell, "mean", cell) for cell in cells)])
            if any(isinstance(cell, Measured) for cell in cells):
                for name in ("std", "n"):
                    values = (getattr(cell, name, None) for cell in cells)
                    columns.append([f"{column.heading} {name}", *values])
        out = io.StringIO()
        rows = ([None if v != v else v for v in row] for row in zip(*columns, strict=True))
        csv.writer(out, lineterminator="\n").writerows(rows)
        return out.getvalue()

    def to_latex(self) -> str:
        r"""A `table` with the rules of `booktabs`, to be used in a paper unchanged."""
        align = "".join("r" if numeric else "l" for numeric in self.numeric)
        lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(self.title)}}}"]
        lines += [rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
        if self.groups:
            spans, rules, end = [], "", 0
            for group, n in self.groups:
                end += n
                spans += [rf"\multicolumn{{{n}}}{{c}}{{{_latex(group)}}}"] if group else [""] * n
                rules += rf"\cmidrule(lr){{{end - n + 1}-{end}}}" if group else ""
            lines += [" & ".join(spans) + r" \\", rules]
        lines += [" & ".join(_latex(c.name) for c in self.columns) + r" \\", r"\midrule"]
        lines += [" & ".join(map(_latex, row)) + r" \\" for row in self.formatted]
        lines += [r"\bottomrule", r"\end{tabular}"]
        lines += [rf"\par\smallskip {_latex(self.note)}"] if self.note else []
        return "\n".join([*lines, r"\end{table}", ""])

    def to_html(self) -> str:
        """A `<figure>` with the table; the page has its style."""
        return fmt.templates().get_template("table.html.j2").render(table=self)

    def formats(self) -> Mapping[str, str]:
        return {
            "md": self.to_markdown(),
            "csv": self.to_csv(),
            "tex": self.to_latex(),
            "html": self.to_html(),
        }


_MARKDOWN = str.maketrans({"\\": "\\\\", "|": "\\|", "\n": " ", "<": "&lt;", ">": "&gt;"})
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "&": r"\&",
        "%": r"\%",
        "$": r"\$",
        "#": r"\#",
        "_": r"\_",
        "{": r"\{",
        "}": r"\}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "λ": r"$\lambda$",
        "–": "--",
        "\u202f": r"\,",
        "\n": " ",
    }
)


def _markdown(value: str) -> str:
    return value.translate(_MARKDOWN)


def _latex(value: str) -> str:
    return value.translate(_LATEX)


@dataclass(frozen=True)
class RunResult:
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
    """By category of `timing.CATEGORIES`."""
    wall: float = math.nan


def run_result(history: History, max_batch: int, seed: int) -> RunResult:
    """The result of a run; NaN for accuracy and iterations unless it is done."""
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
    return [
        RunResult(schedule, batch, 0, accuracy / 100, iterations)
        for batch, row in PUBLISHED_ACCURACY.items()
        for schedule, (accuracy, iterations) in row.items()
    ]


def accuracy_table(results: Iterable[RunResult], *, published: bool = False) -> Table:
    """Accuracy in percent and optimizer steps by schedule and (maximum) batch size.

    Args:
        results: any number of seeds per cell; the means leave NaN out, and the note counts it.
        published: add the rows of the talk.
    """
    measured = list(results)
    sources = {"measured": measured} | ({"published": published_results()} if published else {})
    everything = [result for results in sources.values() for result in results]
    schedules = sorted({result.schedule for result in everything}, key=schedule_order)
    columns = [Column("batch")] + ([Column("source")] if published else [])
    for schedule in schedules:
        group = schedule_name(schedule)
        columns += [Column("accuracy %", group, 2), Column("# iter", group, 0)]
    rows: list[tuple[Cell, ...]] = []
    for batch in sorted({result.max_batch for result in everything}):
        for source, some in sources.items():
            here = [result for result in some if result.max_batch == batch]
            cells: list[Cell] = [batch, source] if published else [batch]
            for schedule in schedules:
                own = [result for result in here if result.schedule == schedule]
                cells.append(summary([100 * result.accuracy for result in own]))
                cells.append(summary([result.iterations for result in own]))
            if here:
                rows.append(tuple(cells))
    seeds = {result.seed for result in measured}
    failed = sum(not math.isfinite(result.accuracy) for result in measured)
    notes = [f"Mean ± sample standard deviation over {len(seeds)} seeds."] if len(seeds) > 1 else []
    notes += [f"{fmt.plural(failed, 'run')} without a result not included."] if failed else []
    title = "Test accuracy and SGD iterations"
    return Table(title, tuple(columns), tuple(rows), " ".join(notes))


def time_table(
    results: Iterable[RunResult],
    *,
    baseline: str = "bl",
    label: Callable[[RunResult], str] | None = None,
    published: bool = False,
) -> Table:
    """Seconds by schedule in the talk's columns, means over the runs with the same label.

    Args:
        results: runs with their seconds; those without any are left out.
        baseline: label (or schedule) that the speed-up is against; the first row where it is not
            among the results.
        label: names the row of a run; by default the schedule.
        published: add the talk's rows, with speed-ups against the talk's own baseline.
    """
    name = label or (lambda result: schedule_name(result.schedule))
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        if result.seconds:
            groups.setdefault(name(result), []).append(result)
    means = {row: _mean_seconds(some) for row, some in groups.items()}
    walls = {row: summary([result.wall for result in some]) for row, some in groups.items()}
    totals = {row: wall.mean if wall else sum(means[row].values()) for row, wall in walls.items()}
    used = {key for seconds in means.values() for key, value in seconds.items() if value > 0}
    extra = [key for key in MORE_CATEGORIES if key in used]
    extra += ["rest"] if used - set(TALK_CATEGORIES) - set(MORE_CATEGORIES) else []
    against = totals.get(schedule_name(baseline), next(iter(totals.values()), math.nan))
    rows: list[tuple[Cell, ...]] = []
    for row, seconds in means.items():
        talk: list[Cell] = [seconds.get(key) or None for key in TALK_CATEGORIES]
        rest = totals[row] - sum(seconds.get(k, 0.0) for k in (*TALK_CATEGORIES, *MORE_CATEGORIES))
        others = {**{key: seconds.get(key) for key in MORE_CATEGORIES}, "rest": rest}
        speed_up = against / totals[row] if totals[row] else None
        rows.append((row, *talk, *(others[k] for k in extra), walls[row] or totals[row], speed_up))
    notes = []
    if "rest" in extra:
        notes += ["rest: data, evaluation, checkpoints, start, losses to failures, other."]
    if published:
        for method, *cells in published_time_table().rows:
            unknown = [None] * len(extra)
            rows.append((f"{method}, published", *cells[:-2], *unknown, *cells[-2:]))
        imagenet = (
            f"{schedule_name(name)} {iterations // 1000}k iterations"
            + (f", {accuracy} %" if accuracy else "")
            for name, (accuracy, iterations) in PUBLISHED_IMAGENET.items()
        )
        notes += [f"Published beside the times: {'; '.join(imagenet)}."]
    heads = [*TALK_CATEGORIES.values(), *extra, "total"]
    columns = [Column("method"), *(Column(head, digits=1) for head in heads)]
    columns += [Column("speed-up", digits=2, suffix="×")]
    title = "Where the time went, seconds"
    return Table(title, tuple(columns), tuple(rows), " ".join(notes))


def published_time_table() -> Table:
    """The talk's time table, its speed-ups computed from its own totals."""
    table = time_table(
        RunResult(schedule, 0, 0, math.nan, math.nan, seconds, sum(seconds.values()))
        for schedule, seconds in PUBLISHED_TIMES.items()
    )
    return replace(table, title=f"{table.title} (ResNet-18 on ImageNet, as published)")


def schedule_name(schedule: str) -> str:
    """`ABSA tuned` for `absa-tuned`; a label after the method is kept: `ABSA r = 0.4`."""
    method, _, label = schedule.partition(" ")
    return f"{SCHEDULE_NAMES.get(method, method)} {label}".strip()


def summary(values: Sequence[float]) -> Measured | None:
    """Mean and sample standard deviation of the finite values; None without any."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return None
    spread = statistics.stdev(known) if len(known) > 1 else math.nan
    return Measured(statistics.fmean(known), spread, len(known))


def schedule_order(schedule: str) -> tuple[int, str]:
    """Sorting key: those of the talk in its order, then the others by name."""
    method, names = schedule.split(" ")[0], list(SCHEDULE_NAMES)
    return names.index(method) if method in names else len(names), schedule


def _mean_seconds(results: Sequence[RunResult]) -> dict[str, float]:
    keys = dict.fromkeys(key for result in results for key in result.seconds)
    return {k: statistics.fmean(r.seconds.get(k, 0.0) for r in results) for k in keys}
