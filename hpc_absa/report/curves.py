"""The course of runs over epochs, as panels that share the axis of epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpc_absa.report import text
from hpc_absa.report.canvas import dress, no_math, say
from hpc_absa.report.history import DecisionPoint, Held, History, labels
from hpc_absa.report.palette import Theme

PANELS = ("lr", "global_batch", "ranks", "eigenvalue", "accuracy")
TITLES: Mapping[str, str] = {
    "lr": "Learning rate",
    "global_batch": "Global batch, samples a step",
    "ranks": "Ranks (MPI processes)",
    "eigenvalue": "Top Hessian eigenvalue λ",
    "accuracy": "Test accuracy, %",
}
DASHES = ("-", (0, (5, 2)), (0, (1, 1.2)), (0, (6, 2, 1, 2)))
"""Line styles that tell runs apart once colours repeat, and where lines lie on each other."""


def draw_course(figure: Any, histories: Sequence[History], theme: Theme) -> None:
    """Draw the course into a figure or a part of one."""
    axes = figure.subplots(len(PANELS), 1, sharex=True, height_ratios=[1, 1, 0.8, 1.35, 1.45])
    panels = dict(zip(PANELS, axes, strict=True))
    single = len(histories) == 1
    for key, ax in panels.items():
        dress(ax, TITLES[key], theme)
    if single:
        _shade_phases(panels, histories[0], theme)
    for i, (history, name) in enumerate(zip(histories, labels(histories), strict=True)):
        colour = theme.line if single else theme.runs[i % len(theme.runs)]
        dash = "-" if single else DASHES[i % len(DASHES)]
        _draw_run(panels, history, name, colour, dash, theme, single)
    if any(math.isfinite(f.epoch) for history in histories for f in history.interruptions):
        _key(panels[PANELS[0]], theme.alarm if single else theme.soft, theme)
    _finish_scales(panels, histories, theme)
    _title(figure, histories, theme)
    if not single:
        handles, names = panels["accuracy"].get_legend_handles_labels()
        figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=min(4, len(names)),
            frameon=False,
            labelcolor=theme.ink,
            fontsize=9,
        )


def _draw_run(
    panels: Mapping[str, Any],
    history: History,
    name: str,
    colour: str,
    dash: Any,
    theme: Theme,
    single: bool,
) -> None:
    line = {"color": colour, "linestyle": dash, "linewidth": 1.8, "solid_capstyle": "butt"}
    for key in ("lr", "global_batch", "ranks"):
        held: tuple[Held, ...] = getattr(history, key)
        xs = [x for span in held for x in (span.begin, span.end)]
        panels[key].plot(xs, [span.value for span in held for _ in range(2)], **line)
    epochs = [e for e in history.epochs if math.isfinite(e.test_accuracy)]
    many = len(epochs) > 40
    panels["accuracy"].plot(
        [e.epoch for e in epochs],
        [100 * e.test_accuracy for e in epochs],
        label=no_math(name),
        marker="" if many else "o",
        markersize=3.5,
        **line,
    )
    if single and epochs:
        last = epochs[-1]
        _beside(panels["accuracy"], last.epoch, 100 * last.test_accuracy, theme)
    _draw_eigenvalues(panels["eigenvalue"], history, line, theme, single)
    failures = [f for f in history.interruptions if math.isfinite(f.epoch)]
    for failure in failures:
        _draw_failure(panels, failure.epoch, theme.alarm if single else colour, single)


def _draw_eigenvalues(
    ax: Any, history: History, line: Mapping[str, Any], theme: Theme, single: bool
) -> None:
    """λ at each decision; hollow points are lower bounds that sufficed, or did not converge."""
    shown = [d for d in history.decisions if d.eigenvalue > 0]
    ax.plot([d.epoch for d in shown], [d.eigenvalue for d in shown], **{**line, "linewidth": 1.2})
    names = ("λ", "λ, at least", "λ, not converged", "λ, batch grows")
    groups: dict[str, list[Any]] = {name: [] for name in names}
    for d in shown:
        groups[_kind(d)].append(d)
    colour = line["color"]
    looks: dict[str, dict[str, Any]] = {
        "λ": {"marker": "o", "s": 16, "color": colour},
        "λ, at least": {"marker": "o", "s": 20, "facecolor": theme.paper, "edgecolor": colour},
        "λ, not converged": {
            "marker": "o",
            "s": 20,
            "facecolor": theme.paper,
            "edgecolor": theme.soft,
        },
        "λ, batch grows": {
            "marker": "^",
            "s": 62,
            "color": theme.mark if single else colour,
            "edgecolor": theme.paper,
            "linewidth": 0.8,
        },
    }
    for key, points in groups.items():
        if points:
            xs, ys = [d.epoch for d in points], [d.eigenvalue for d in points]
            ax.scatter(xs, ys, label=key, zorder=4, **looks[key])
    useless = [d.epoch for d in history.decisions if not d.eigenvalue > 0 and d.matvecs > 0]
    if useless and shown:
        ax.scatter(
            useless,
            [0.04] * len(useless),
            transform=ax.get_xaxis_transform(),
            marker="x",
            s=22,
            linewidth=1.3,
            color=theme.soft,
            label="no positive λ",
            zorder=4,
        )
    if single:
        _draw_threshold(ax, history, theme)
        if shown:
            ax.legend(
                loc="lower right",
                bbox_to_anchor=(1.0, 0.985),
                ncols=5,
                frameon=False,
                fontsize=8.5,
                labelcolor=theme.soft,
                handletextpad=0.3,
                columnspacing=1.1,
                borderaxespad=0.1,
            )


def _kind(decision: DecisionPoint) -> str:
    """What the figure's legend calls this estimate."""
    if decision.action == "grow":
        return "λ, batch grows"
    if decision.stopped_above_threshold:
        return "λ, at least"
    return "λ" if decision.converged else "λ, not converged"


def _draw_threshold(ax: Any, history: History, theme: Theme) -> None:
    """The value that λ must fall to, between one decision and the next."""
    alpha = _alpha(history)
    ref = r"$\lambda_\mathrm{ref}$"
    name = ref if alpha is None else f"growth threshold {ref}/{alpha:g}"
    xs: list[float] = []
    ys: list[float] = []
    estimated = [decision for decision in history.decisions if decision.matvecs > 0]
    before = estimated[0].epoch if estimated else 0.0
    for decision in estimated:
        if decision.reference > 0:
            xs += [before, decision.epoch]
            ys += [decision.reference / (alpha or 1.0)] * 2
        before = decision.epoch
    if xs:
        ax.plot(xs, ys, color=theme.soft, linewidth=1.1, linestyle=(0, (4, 2)), label=name)


def _alpha(history: History) -> float | None:
    schedule = history.job.get("schedule")
    alpha = schedule.get("alpha") if isinstance(schedule, Mapping) else None
    return float(alpha) if isinstance(alpha, int | float) and alpha > 0 else None


def _draw_failure(panels: Mapping[str, Any], epoch: float, colour: str, single: bool) -> None:
    for key, ax in panels.items():
        if single:
            ax.axvline(epoch, color=colour, linewidth=1.1, linestyle=(0, (2, 2)), zorder=3)
        if key == PANELS[0]:
            ax.plot(
                [epoch],
                [1.0],
                marker="X",
                markersize=8,
                color=colour,
                transform=ax.get_xaxis_transform(),
                clip_on=False,
                zorder=6,
            )


def _key(ax: Any, colour: str, theme: Theme) -> None:
    """What the crosses are, over the top panel's right end."""
    ax.plot([], [], marker="X", linestyle="", color=colour, label="failure")
    ax.legend(
        loc="lower right",
        bbox_to_anchor=(1.0, 1.03),
        frameon=False,
        fontsize=8.5,
        labelcolor=theme.soft,
        handletextpad=0.2,
        borderaxespad=0.1,
    )


def _shade_phases(panels: Mapping[str, Any], history: History, theme: Theme) -> None:
    """Every other phase on darker paper, its number at the top where there is room."""
    end = max(history.epochs_visited, 1e-9)
    for i, phase in enumerate(history.phases):
        begin, stop = phase.epoch_begin, max(phase.epoch_end, phase.epoch_begin)
        for ax in panels.values():
            if i % 2:
                ax.axvspan(begin, stop, color=theme.band, zorder=0, linewidth=0)
        wide = (stop - begin) / end
        if wide > 0.035:
            words = f"phase {phase.number}" if wide > 0.09 else f"{phase.number}"
            top = panels[PANELS[0]]
            top.annotate(
                words,
                ((begin + stop) / 2, 1.0),
                xycoords=top.get_xaxis_transform(),
                xytext=(0, -3),
                textcoords="offset points",
                ha="center",
                va="top",
                fontsize=8,
                color=theme.soft,
            )


def _finish_scales(panels: Mapping[str, Any], histories: Sequence[History], theme: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    end = max((h.epochs_visited for h in histories), default=0.0)
    bottom = panels["accuracy"]
    bottom.set_xlim(0, end if end > 0 else 1)
    bottom.xaxis.set_major_locator(MaxNLocator(12, integer=end >= 2, steps=[1, 2, 5, 10]))
    bottom.margins(y=0.14)
    bottom.set_xlabel("epochs", color=theme.soft, fontsize=9.5)
    for key in ("global_batch", "ranks"):
        _powers_of_two(panels[key], [s.value for h in histories for s in getattr(h, key)])
    _lr_scale(panels["lr"], [s.value for h in histories for s in h.lr])
    if any(d.eigenvalue > 0 for h in histories for d in h.decisions):
        _log_scale(panels["eigenvalue"])
    else:
        panels["eigenvalue"].set_yticks([])
        say(panels["eigenvalue"], "no eigenvalue was estimated", theme)
    if not any(math.isfinite(e.test_accuracy) for h in histories for e in h.epochs):
        bottom.set_yticks([])
        say(bottom, "no test accuracy was measured", theme)
    for key in ("lr", "global_batch", "ranks"):
        if not any(getattr(h, key) for h in histories):
            panels[key].set_yticks([])
            say(panels[key], "no epoch has been finished", theme)


def _powers_of_two(ax: Any, values: Sequence[float]) -> None:
    """A doubling axis with the values themselves as its labels, as far as they keep apart."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    shown = sorted({v for v in values if v > 0})
    if not shown:
        return
    ax.set_yscale("log", base=2)
    low, high = shown[0], shown[-1]
    ticks: list[float] = []
    gap = max(math.log2(high / low) / 6, 0.25)
    for value in reversed(shown):
        if not ticks or math.log2(ticks[-1] / value) >= gap or value == high:
            ticks.append(value)
    if low not in ticks:
        ticks[-1 if len(ticks) > 1 and math.log2(ticks[-1] / low) < gap else len(ticks) :] = [low]
    ax.yaxis.set_major_locator(FixedLocator(ticks))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text.count(value)))
    margin = max((high / low) ** 0.14, 1.25)
    ax.set_ylim(low / margin, high * margin)


def _lr_scale(ax: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    shown = [v for v in values if v > 0]
    if shown and max(shown) / min(shown) > 15:
        _log_scale(ax)
    elif shown:
        ax.set_ylim(0, max(shown) * 1.25)
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _log_scale(ax: Any) -> None:
    """Logarithmic, with plain numbers and never fewer than two labels."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    ax.set_yscale("log")
    low, high = ax.get_ylim()
    spread = max(1.15, 2 * (low / high) ** 0.5)
    low, high = low / spread, high * spread
    ax.set_ylim(low, high)
    decades = math.log10(high / low)
    subs = (1.0,) if decades > 2.2 else (1.0, 3.0) if decades > 1.2 else (1.0, 2.0, 5.0)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


def _beside(ax: Any, x: float, y: float, theme: Theme) -> None:
    """The last value in figures, above its point."""
    ax.annotate(
        f"{y:.2f}",
        (x, y),
        xytext=(0, 5),
        textcoords="offset points",
        ha="right",
        va="bottom",
        fontsize=9,
        color=theme.ink,
        fontweight="bold",
    )


def _title(figure: Any, histories: Sequence[History], theme: Theme) -> None:
    if len(histories) == 1:
        history = histories[0]
        method = f" · {history.method.upper()}" if history.method else ""
        words = f"{history.name}{method}"
    else:
        words = f"{len(histories)} runs"
    figure.suptitle(
        no_math(words), x=0.01, ha="left", fontsize=13, fontweight="bold", color=theme.ink
    )
