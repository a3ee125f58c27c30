"""Figures of runs as image files for papers, drawn with Agg: no display is needed.

The colours are those of Okabe and Ito, which colour-blind readers can tell apart.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpc_absa.report import format as fmt
from hpc_absa.report.history import Decision, History, job_table, labels
from hpc_absa.report.scalars import rows
from hpc_absa.report.timing import CATEGORIES, finite
from hpc_absa.rundir.files import write_atomic

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
ORANGE, SKY, PURPLE, YELLOW = "#E69F00", "#56B4E9", "#CC79A7", "#F0E442"


BACKGROUND, TEXT, SOFT = "#ffffff", "#1c2126", "#5b6570"
"""`SOFT`: of axes and secondary text."""
GRID, BAND = "#e3e7eb", "#f1f4f7"
"""`BAND`: background of every other phase."""
FAILURE, GROWTH = VERMILLION, GREEN
"""Failures, and decisions to grow."""
RUNS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, TEXT)
"""The curves of several runs; of a single one the first."""

CATEGORY_STYLE: Mapping[str, tuple[str, str]] = {
    "comp": (BLUE, ""),
    "comm": (SKY, ""),
    "adversarial": (PURPLE, ""),
    "hessian": (ORANGE, ""),
    "diagonal": ("#f3cf80", ""),
    "data": (GREEN, ""),
    "eval": ("#7ccfb5", ""),
    "checkpoint": (YELLOW, ""),
    "start": ("#8a949e", ""),
    "rehearsal": ("#6f5aa8", ""),
    "resize": (VERMILLION, ""),
    "lost": ("#6b1d1d", "////"),
    "other": ("#c3cad1", ""),
    "unmeasured": ("#e0e4e8", "\\\\\\\\"),
}
"""Colour and hatching of each category of seconds."""

WIDTH = 9.0
"""Inches."""
TRAINING_HEIGHT = 10.6
TALK_HEIGHT = 3.4
LARGEST_HEIGHT = 60.0
"""Of thousands of bars: an image has less than 65,536 pixels in each direction."""
PANELS: Mapping[str, tuple[str, float]] = {
    "loss": ("Loss: train, and test dotted", 1.35),
    "lr": ("Learning rate", 1.0),
    "global_batch": ("Global batch, samples per step", 1.0),
    "ranks": ("Ranks (MPI processes)", 0.8),
    "eigenvalue": ("Top Hessian eigenvalue λ", 1.35),
    "accuracy": ("Test accuracy, %", 1.45),
}
"""Panels of the training figure, top to bottom: title and relative height."""

DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))
"""Line styles of several runs: colours repeat, and curves may coincide."""

LOSSES: Mapping[str, Mapping[str, Any]] = {
    "train_loss": {},
    "test_loss": {"linestyle": ":", "linewidth": 1.3},
}
"""Losses of `epoch` events, and how their lines differ."""
PARTS = ("training", "seconds")
FIGURES = ("training", "seconds", "talk")
"""Files of `save`."""
FORMATS: Mapping[str, Mapping[str, str | None]] = {
    "pdf": {"Creator": "hpc-absa", "CreationDate": None},
    "svg": {"Creator": "hpc-absa", "Date": None},
    "png": {"Software": "hpc-absa"},
}
"""Their formats, and the metadata of each: `files.MARK`, and no date."""


def png(histories: Sequence[History]) -> bytes:
    """Both parts in one image."""
    return _render(histories, PARTS, format="png", dpi=130, metadata=FORMATS["png"])


def paths(folder: Path) -> list[Path]:
    """The files of `save`."""
    return [folder / f"{name}.{kind}" for name in FIGURES for kind in FORMATS]


def save(histories: Sequence[History], folder: Path) -> list[Path]:
    """Write each figure as PDF, SVG and PNG; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths(folder):
        kind = path.suffix[1:]
        content = _render(histories, [path.stem], format=kind, dpi=300, metadata=FORMATS[kind])
        write_atomic(path, content)
    return paths(folder)


def draw(histories: Sequence[History], parts: Sequence[str]) -> Any:
    """The figure of one run or several.

    `training`: learning rate, batch, ranks, eigenvalue and accuracy over epochs, one panel each. A
    single run has its phases shaded, its threshold and its growth points marked; several runs are
    overlaid, each in its own colour. `seconds`: where each second went, a bar for each phase of
    one run, or for each of several runs. `talk`: the two panels of the talk, accuracy over SGD
    iterations and the global batch over epochs.
    """
    from matplotlib.figure import Figure

    drawing = {"training": _draw_training, "seconds": _draw_seconds, "talk": _draw_talk}
    heights = {
        "training": TRAINING_HEIGHT,
        "seconds": seconds_height(histories),
        "talk": TALK_HEIGHT,
    }
    ratios = [heights[part] for part in parts]
    figure = Figure(figsize=(WIDTH, sum(ratios)), layout="constrained")
    rows = figure.subfigures(len(parts), 1, height_ratios=ratios, squeeze=False)[:, 0]
    for part, row in zip(parts, rows, strict=True):
        drawing[part](row, histories)
    return figure


def seconds_height(histories: Sequence[History]) -> float:
    """Inches."""
    bars = _bars(histories)
    used = {key for _, seconds in bars for key, value in seconds.items() if value > 0}
    height = 1.0 + 0.36 * max(1, len(bars)) + 0.24 * math.ceil(len(used) / 4)
    return min(height, LARGEST_HEIGHT)


def _render(histories: Sequence[History], parts: Sequence[str], **options: Any) -> bytes:
    import matplotlib as mpl

    out = io.BytesIO()
    style: dict[Any, Any] = {
        "axes.axisbelow": True,
        "axes.edgecolor": SOFT,
        "axes.facecolor": BACKGROUND,
        "axes.grid": True,
        "axes.labelcolor": SOFT,
        "axes.labelsize": 9.5,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlecolor": TEXT,
        "axes.titlepad": 5,
        "axes.titlesize": 10,
        "axes.titley": 1.0,
        "figure.facecolor": BACKGROUND,
        "figure.titlesize": 13,
        "figure.titleweight": "bold",
        "grid.color": GRID,
        "grid.linewidth": 0.7,
        "legend.fontsize": 8.5,
        "legend.frameon": False,
        "legend.labelcolor": SOFT,
        "svg.fonttype": "path",
        "svg.hashsalt": "hpc-absa",
        "text.color": TEXT,
    }
    for axis in ("xtick", "ytick"):
        style |= {f"{axis}.color": SOFT, f"{axis}.labelsize": 9}
        style |= {f"{axis}.major.size": 3, f"{axis}.minor.size": 0}
    with mpl.rc_context(style):
        draw(histories, parts).savefig(out, **options)
    return out.getvalue()


def _no_math(text: str) -> str:
    """A user's dollar signs do not start a formula."""
    return text.replace("$", r"\$")


def _draw_training(figure: Any, histories: Sequence[History]) -> None:
    heights = [height for _, height in PANELS.values()]
    axes = figure.subplots(len(PANELS), 1, sharex=True, height_ratios=heights)
    panels: dict[str, Any] = dict(zip(PANELS, axes, strict=True))
    for key, ax in panels.items():
        ax.set_title(PANELS[key][0], loc="left")
    single = len(histories) == 1
    if single:
        _shade_phases(panels, histories[0])
    for i, (history, name) in enumerate(zip(histories, labels(histories), strict=True)):
        colour = BLUE if single else RUNS[i % len(RUNS)]
        dash = "-" if single else DASHES[i % len(DASHES)]
        line = {"color": colour, "linestyle": dash, "linewidth": 1.8, "solid_capstyle": "butt"}
        _draw_run(panels, history, name, line, single)
    if any(math.isfinite(f.epoch) for history in histories for f in history.interruptions):
        top, colour = panels["lr"], FAILURE if single else SOFT
        top.plot([], [], marker="X", linestyle="", color=colour, label="failure")
        look = {"bbox_to_anchor": (1.0, 1.03), "handletextpad": 0.2, "borderaxespad": 0.1}
        top.legend(loc="lower right", **look)
    _set_scales(panels, histories)
    title = f"{len(histories)} runs"
    if single:
        method = histories[0].method
        title = histories[0].name + (f" · {method.upper()}" if method else "")
    else:
        _legend(figure, panels["accuracy"])
    figure.suptitle(_no_math(title), x=0.01, ha="left")


def _draw_talk(figure: Any, histories: Sequence[History]) -> None:
    accuracy, batch = figure.subplots(1, 2)
    values = set()
    for i, (history, name) in enumerate(zip(histories, labels(histories), strict=True)):
        line = {"color": RUNS[i % len(RUNS)], "linestyle": DASHES[i % len(DASHES)]}
        points = [(row.get("step"), row.get("test_accuracy")) for row in rows(history)]
        points = [(step, value) for step, value in points if value is not None]
        steps, percent = [step for step, _ in points], [100 * finite(v) for _, v in points]
        accuracy.plot(steps, percent, label=_no_math(name), linewidth=1.8, **line)
        spans = history.spans["global_batch"]
        values |= {span.value for span in spans if span.value > 0}
        epochs = [epoch for span in spans for epoch in (span.begin, span.end)]
        sizes = [span.value for span in spans for _ in range(2)]
        batch.plot(epochs, sizes, linewidth=1.8, **line)
    accuracy.set_title("Test accuracy, %", loc="left")
    accuracy.set_xlabel("SGD iterations")
    batch.set_title("Global batch, samples per step", loc="left")
    batch.set_xlabel("epochs")
    if values:
        _powers_of_two(batch, sorted(values))
    if len(histories) > 1:
        _legend(figure, accuracy)


def _legend(figure: Any, ax: Any) -> None:
    handles, names = ax.get_legend_handles_labels()
    look = {"loc": "outside lower center", "labelcolor": TEXT, "fontsize": 9}
    figure.legend(handles, names, ncols=min(4, len(names)), **look)


def _draw_run(
    panels: Mapping[str, Any],
    history: History,
    name: str,
    line: Mapping[str, Any],
    single: bool,
) -> None:
    for key in ("lr", "global_batch", "ranks"):
        spans = history.spans[key]
        epochs = [epoch for span in spans for epoch in (span.begin, span.end)]
        panels[key].plot(epochs, [span.value for span in spans for _ in range(2)], **line)
    _draw_losses(panels["loss"], history, line)
    measured = [e for e in history.epochs if math.isfinite(e.test_accuracy)]
    panels["accuracy"].plot(
        [e.epoch for e in measured],
        [100 * e.test_accuracy for e in measured],
        label=_no_math(name),
        marker="" if len(measured) > 40 else "o",
        markersize=3.5,
        **line,
    )
    if single and measured:
        look = {"ha": "right", "va": "bottom", "fontsize": 9, "fontweight": "bold"}
        last, value = measured[-1].epoch, 100 * measured[-1].test_accuracy
        _annotate(panels["accuracy"], f"{value:.2f}", (last, value), (0, 5), **look)
    _draw_eigenvalues(panels["eigenvalue"], history, line, single)
    colour = FAILURE if single else line["color"]
    top = panels["lr"]
    epochs = [f.epoch for f in history.interruptions if math.isfinite(f.epoch)]
    for epoch in epochs if single else ():
        for ax in panels.values():
            ax.axvline(epoch, color=colour, linewidth=1.1, linestyle=(0, (2, 2)), zorder=3)
    if epochs:
        look = {"marker": "X", "linestyle": "", "markersize": 8, "clip_on": False, "zorder": 6}
        at_top = top.get_xaxis_transform()
        top.plot(epochs, [1.0] * len(epochs), color=colour, transform=at_top, **look)


def _draw_losses(ax: Any, history: History, line: Mapping[str, Any]) -> None:
    table = [row for row in rows(history) if row["event"] == "epoch"]
    for column, look in LOSSES.items():
        some = [(row["epoch"], row[column]) for row in table if finite(row.get(column), 0.0)]
        ax.plot([epoch for epoch, _ in some], [loss for _, loss in some], **{**line, **look})


def _annotate(ax: Any, text: str, at: tuple[float, float], points: Any, **style: Any) -> None:
    ax.annotate(text, at, xytext=points, textcoords="offset points", **style)


def _draw_eigenvalues(ax: Any, history: History, line: Mapping[str, Any], single: bool) -> None:
    """λ at each decision; hollow points are lower bounds, or did not converge."""
    shown = [d for d in history.decisions if d.eigenvalue > 0]
    ax.plot([d.epoch for d in shown], [d.eigenvalue for d in shown], **{**line, "linewidth": 1.2})
    colour = line["color"]
    hollow = {"marker": "o", "s": 20, "facecolor": BACKGROUND}
    growth = {"marker": "^", "s": 62, "edgecolor": BACKGROUND, "linewidth": 0.8}
    looks: dict[str, dict[str, Any]] = {
        "λ": {"marker": "o", "s": 16, "color": colour},
        "λ, at least": {**hollow, "edgecolor": colour},
        "λ, not converged": {**hollow, "edgecolor": SOFT},
        "λ, batch grows": {**growth, "color": GROWTH if single else colour},
    }
    for label, look in looks.items():
        points = [d for d in shown if _label(d) == label]
        if points:
            x, y = [d.epoch for d in points], [d.eigenvalue for d in points]
            ax.scatter(x, y, label=label, zorder=4, **look)
    unusable = [d.epoch for d in history.decisions if not d.eigenvalue > 0 and d.matvecs > 0]
    if unusable and shown:
        cross = {"marker": "x", "s": 22, "linewidth": 1.3, "color": SOFT, "zorder": 4}
        at_bottom = {"transform": ax.get_xaxis_transform(), "label": "no positive λ"}
        ax.scatter(unusable, [0.04] * len(unusable), **cross, **at_bottom)
    if single:
        _draw_threshold(ax, history)
        if shown:
            look = {"bbox_to_anchor": (1.0, 0.985), "handletextpad": 0.3, "borderaxespad": 0.1}
            ax.legend(loc="lower right", ncols=5, columnspacing=1.1, **look)


def _label(decision: Decision) -> str:
    if decision.action == "grow":
        return "λ, batch grows"
    if decision.stopped_above_threshold:
        return "λ, at least"
    return "λ" if decision.converged else "λ, not converged"


def _draw_threshold(ax: Any, history: History) -> None:
    """The value that λ must fall to, from one decision to the next."""
    alpha = finite(job_table(history.job, "schedule").get("alpha"), 0.0)
    reference = r"$\lambda_\mathrm{ref}$"
    name = f"growth threshold {reference}/{alpha:g}" if alpha > 0 else reference
    estimated = [decision for decision in history.decisions if decision.matvecs > 0]
    epochs = [d.epoch for d in estimated]
    values = [d.reference / (alpha or 1.0) if d.reference > 0 else math.nan for d in estimated]
    if any(math.isfinite(value) for value in values):
        dashed = {"color": SOFT, "linewidth": 1.1, "linestyle": (0, (4, 2))}
        ax.step(epochs, values, where="pre", label=name, **dashed)


def _shade_phases(panels: Mapping[str, Any], history: History) -> None:
    """Shade every other phase, and number those that are wide enough."""
    end = max(history.epochs_visited, 1e-9)
    top = panels["lr"]
    for i, phase in enumerate(history.phases):
        begin, stop = phase.epoch_begin, max(phase.epoch_end, phase.epoch_begin)
        for ax in panels.values() if i % 2 else ():
            ax.axvspan(begin, stop, color=BAND, zorder=0, linewidth=0)
        width = (stop - begin) / end
        if width > 0.035:
            text = f"phase {phase.number}" if width > 0.09 else f"{phase.number}"
            look = {"ha": "center", "va": "top", "fontsize": 8, "color": SOFT}
            middle = ((begin + stop) / 2, 1.0)
            _annotate(top, text, middle, (0, -3), xycoords=top.get_xaxis_transform(), **look)


def _set_scales(panels: Mapping[str, Any], histories: Sequence[History]) -> None:
    from matplotlib.ticker import MaxNLocator

    end = max((h.epochs_visited for h in histories), default=0.0)
    bottom = panels["accuracy"]
    bottom.set_xlim(0, end if end > 0 else 1)
    bottom.xaxis.set_major_locator(MaxNLocator(12, integer=end >= 2, steps=[1, 2, 5, 10]))
    bottom.margins(y=0.14)
    bottom.set_xlabel("epochs")
    for key in ("lr", "global_batch", "ranks"):
        values = sorted({s.value for h in histories for s in h.spans[key] if s.value > 0})
        if not any(h.spans[key] for h in histories):
            _empty(panels[key], "no epoch has been finished")
        elif values and key != "lr":
            _powers_of_two(panels[key], values)
        elif values and values[-1] / values[0] > 15:
            _log_scale(panels[key])
        elif values:
            panels[key].set_ylim(0, values[-1] * 1.25)
            panels[key].yaxis.set_major_locator(MaxNLocator(4))
            panels[key].yaxis.set_major_formatter("{x:g}")
    if any(d.eigenvalue > 0 for h in histories for d in h.decisions):
        _log_scale(panels["eigenvalue"])
    else:
        _empty(panels["eigenvalue"], "no eigenvalue was estimated")
    epochs = [e for h in histories for e in h.kept if e["event"] == "epoch"]
    losses = [loss for e in epochs for k in LOSSES if (loss := finite(e.get(k), 0.0))]
    if not losses:
        _empty(panels["loss"], "no loss was measured")
    elif min(losses) > 0:  # some are negative, such as of a log-likelihood
        _log_scale(panels["loss"])
    if not any(math.isfinite(e.test_accuracy) for h in histories for e in h.epochs):
        _empty(bottom, "no test accuracy was measured")


def _empty(ax: Any, message: str) -> None:
    ax.set_yticks([])
    look = {"ha": "center", "va": "center", "color": SOFT, "size": 9.5}
    ax.text(0.5, 0.5, message, transform=ax.transAxes, **look)


def _powers_of_two(ax: Any, values: Sequence[float]) -> None:
    """A doubling axis, labelled with some of the sorted values themselves."""
    ax.set_yscale("log", base=2)
    low, high = values[0], values[-1]
    ticks = sorted({low, *values[:: -math.ceil(len(values) / 6)]})
    ax.set_yticks(ticks, map(fmt.count, ticks))
    ax.set_yticks([], minor=True)
    margin = max((high / low) ** 0.14, 1.25)
    ax.set_ylim(low / margin, high * margin)


def _log_scale(ax: Any) -> None:
    """Logarithmic, with plain numbers and never fewer than two labels."""
    from matplotlib.ticker import LogLocator

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    spread = max(1.15, 2 * (low / high) ** 0.5)
    low, high = low / spread, high * spread
    ax.set_ylim(low, high)
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 2.2 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    ax.yaxis.set_major_formatter("{x:.4g}")
    ax.yaxis.set_minor_formatter("")


def _draw_seconds(figure: Any, histories: Sequence[History]) -> None:
    bars = _bars(histories)
    totals = [sum(seconds.values()) for _, seconds in bars]
    longest = max(totals, default=0.0)
    unit, scale = ("seconds", 1.0) if longest < 600 else ("minutes", 60.0)
    if longest >= 3 * 3600:
        unit, scale = "hours", 3600.0
    ax = figure.subplots()
    ax.set_title(f"Where the time went, {unit}", loc="left")
    ax.grid(visible=False, axis="y")
    left = [0.0] * len(bars)
    for key, (colour, hatch) in CATEGORY_STYLE.items():
        seconds = [s.get(key, 0.0) for _, s in bars]
        if not any(seconds):
            continue
        share = sum(seconds) / sum(totals)
        widths = [s / scale for s in seconds]
        look = {"color": colour, "hatch": hatch, "edgecolor": BACKGROUND, "linewidth": 0.6}
        label = f"{CATEGORIES[key]}  {fmt.percent(share, 0 if share >= 0.0995 else 1)}"
        ax.barh(range(len(bars)), widths, left=left, height=0.62, label=label, **look)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, length in enumerate(totals):
        _annotate(ax, fmt.duration(length), (left[i], i), (5, 0), va="center", fontsize=9)
    if longest == 0:
        ax.set_xticks([])
        _empty(ax, "no second has been counted yet")
    ax.set_yticks(range(len(bars)), [name for name, _ in bars])
    ax.set_ylim(max(1, len(bars)) - 0.5, -0.5)
    ax.set_xlim(0, max(left, default=0) * 1.13 or 1)
    ax.tick_params(axis="y", length=0, labelcolor=TEXT)
    if longest > 0:
        _legend(figure, ax)


def _bars(histories: Sequence[History]) -> list[tuple[str, Mapping[str, float]]]:
    if len(histories) > 1:
        names = map(_no_math, labels(histories))
        return [(name, h.seconds) for name, h in zip(names, histories, strict=True)]
    bars = []
    for phase in histories[0].phases:
        size = f"{fmt.plural(phase.ranks, 'rank')}, batch {fmt.count(phase.global_batch)}"
        bars.append((f"phase {phase.number}   {size}", phase.seconds))
    return bars
