"""What made the batch grow in each cell of a sweep, and the figure of λ with its sampling error."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from hpc_absa.report.figures import GRID, RUNS, TEXT
from hpc_absa.report.tables import Cell as TableCell
from hpc_absa.report.tables import Column, Measured, Table, schedule_name, schedule_order, summary
from hpc_absa.report.timing import finite
from hpc_absa.rundir.events import Event, effective
from hpc_absa.study.sweep import Cell, StudyDir

CAUSES = {"eigenvalue": "by λ", "patience": "by patience"}
"""Columns of the table; all other causes are in one more."""
PANEL = (3.4, 2.3)
"""Inches of one panel of the figure."""
COLUMNS = 3
COLOURS = {"eigenvalue": "#009E73", "patience": "#D55E00"}
_BY_EIGENVALUE = re.compile(r"λ [^;]* ≤ ")


@dataclass(frozen=True)
class Growths:
    """The decisions of one run that made its batch grow."""

    causes: tuple[str, ...]
    points: int
    """Decision points at which the batch could grow."""
    first: float
    """Epoch of the first growth; NaN without any."""

    def count(self, cause: str) -> int:
        return self.causes.count(cause)


def growths(events: Sequence[Event], max_batch: int) -> Growths:
    """Of a run, from its events without those that a crash undid."""
    decisions = [event for event in events if event["event"] == "decision"]
    grown = [event for event in decisions if event.get("action") == "grow"]
    below = [e for e in decisions if finite(e.get("batch"), 0.0) < max_batch and not _last(e)]
    first = finite(grown[0].get("epoch")) if grown else math.nan
    return Growths(tuple(map(cause_of, grown)), len(below), first)


def cause_of(event: Event) -> str:
    """The `cause` of a growth; derived from its reason in logs of versions without that field."""
    if event.get("cause"):
        return str(event["cause"])
    reason = str(event.get("reason", ""))
    if _BY_EIGENVALUE.match(reason):
        return "eigenvalue"
    return "patience" if "no growth for" in reason else "schedule"


def _last(event: Event) -> bool:
    return event.get("action") == "finish"


def table(study: StudyDir) -> Table:
    """Growths by cause for each schedule and maximum batch whose batch grew in a run."""
    cells: dict[tuple[str, int], list[Growths]] = {}
    for cell, events in _done(study):
        run = growths(events, cell.max_batch)
        if run.causes:
            cells.setdefault((cell.schedule, cell.max_batch), []).append(run)
    rows: list[tuple[TableCell, ...]] = []
    for schedule, batch in sorted(cells, key=lambda key: (*schedule_order(key[0]), key[1])):
        found = cells[schedule, batch]
        total = sum(len(run.causes) for run in found)
        by_cause = {cause: [run.count(cause) for run in found] for cause in CAUSES}
        other = [len(run.causes) - sum(run.count(cause) for cause in CAUSES) for run in found]
        points = sum(run.points for run in found)
        rows.append(
            (
                schedule_name(schedule),
                batch,
                summary([len(run.causes) for run in found]),
                *(summary(counts) for counts in by_cause.values()),
                summary(other),
                100 * sum(by_cause["eigenvalue"]) / total,
                summary([run.first for run in found]),
                Measured(points / total),
            )
        )
    columns = (
        Column("schedule"), Column("batch"), Column("growths", digits=1),
        *(Column(name, digits=1) for name in CAUSES.values()), Column("otherwise", digits=1),
        Column("by λ %", digits=0), Column("first at epoch", digits=1),
        Column("decisions per growth", digits=2),
    )  # fmt: skip
    note = (
        "Growths per run, mean ± sample standard deviation over seeds. The reciprocal of the last "
        "column is the rate of schedule 'random' that grows as often."
    )
    return Table("What made the batch grow", columns, tuple(rows), note if rows else "")


def figure(study: StudyDir, suffix: str = "png") -> bytes | None:
    """λ with its sampling error over the epochs, a panel for each cell; None without any λ."""
    panels: dict[tuple[str, int], list[tuple[Cell, list[Event]]]] = {}
    for cell, events in _done(study):
        decisions = [event for event in events if finite(event.get("eigenvalue"), 0.0) > 0]
        if decisions:
            panels.setdefault((cell.schedule, cell.max_batch), []).append((cell, decisions))
    if not panels:
        return None
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = -(-len(panels) // COLUMNS)
    columns = min(COLUMNS, len(panels))
    options: dict[Any, Any] = {"font.size": 8, "svg.fonttype": "path", "svg.hashsalt": "λ"}
    with mpl.rc_context(options):
        drawing = Figure(figsize=(columns * PANEL[0], rows * PANEL[1]), layout="constrained")
        axes = drawing.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
        for (schedule, batch), runs in panels.items():
            ax = next(axes)
            _draw(ax, runs)
            title = f"{schedule_name(schedule)}, B ≤ {batch}".replace("$", r"\$")
            ax.set_title(title, loc="left", fontsize=9)
        for ax in axes:
            ax.set_visible(False)
        handles, names = _marks(drawing.axes[0])
        drawing.legend(handles, names, loc="outside lower center", ncols=3, frameon=False)
        drawing.supxlabel("epochs")
        drawing.supylabel("top Hessian eigenvalue λ ± its sampling error")
        out = io.BytesIO()
        metadata = {"Date": None} if suffix == "svg" else {}
        drawing.savefig(out, format=suffix, dpi=130, metadata=metadata)
    return out.getvalue()


def _draw(ax: Any, runs: Sequence[tuple[Cell, Sequence[Event]]]) -> None:
    ax.set_yscale("log")
    ax.grid(visible=True, color=GRID, linewidth=0.6)
    for index, (_, events) in enumerate(runs):
        colour = RUNS[index % len(RUNS)]
        epochs = [finite(event.get("epoch")) for event in events]
        values = [finite(event.get("eigenvalue")) for event in events]
        # Down to a tenth of the value at most: the axis is logarithmic.
        errors = [finite(event.get("sampling_error"), 0.0) for event in events]
        low = [min(error, 0.9 * value) for error, value in zip(errors, values, strict=True)]
        ax.errorbar(
            epochs, values, yerr=(low, errors), color=colour, ecolor=colour, elinewidth=0.7,
            linewidth=1, marker=".", markersize=3, alpha=0.8,
        )  # fmt: skip
        for event, epoch, value in zip(events, epochs, values, strict=True):
            if event.get("action") == "grow":
                look = {"marker": "^", "s": 34, "zorder": 4, "edgecolor": "white"}
                ax.scatter(epoch, value, color=COLOURS.get(cause_of(event), TEXT), **look)


def _marks(ax: Any) -> tuple[list[Any], list[str]]:
    look = {"marker": "^", "linestyle": "", "markersize": 6}
    names = [*(f"growth {name}" for name in CAUSES.values()), "growth otherwise"]
    colours = [*COLOURS.values(), TEXT]
    handles = [ax.plot([], [], color=colour, **look)[0] for colour in colours]
    return handles, names


def _done(study: StudyDir) -> Iterator[tuple[Cell, list[Event]]]:
    for cell in study.cells:
        if study.state(cell) == "done":
            yield cell, list(effective(study.run(cell).log.read()))
