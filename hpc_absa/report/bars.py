"""Where each second went, as stacked bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpc_absa.report import text
from hpc_absa.report.accounting import CATEGORIES
from hpc_absa.report.canvas import dress, no_math, say
from hpc_absa.report.history import History, labels
from hpc_absa.report.palette import CATEGORY_STYLE, Theme


def draw_seconds(figure: Any, histories: Sequence[History], theme: Theme) -> None:
    """Draw the stacked bars into a figure or a part of one."""
    bars = _bars(histories)
    ax = figure.subplots()
    unit, scale = _time_unit(max((sum(s.values()) for _, s in bars), default=0.0))
    dress(ax, f"Where the time went, {unit}", theme)
    ax.grid(visible=False, axis="y")
    used = [key for key in CATEGORIES if any(s.get(key, 0) > 0 for _, s in bars)]
    whole = sum(sum(s.values()) for _, s in bars)
    left = [0.0] * len(bars)
    for key in used:
        widths = [s.get(key, 0.0) / scale for _, s in bars]
        colour, hatch = CATEGORY_STYLE[key]
        share = sum(s.get(key, 0.0) for _, s in bars) / whole
        ax.barh(
            range(len(bars)),
            widths,
            left=left,
            height=0.62,
            color=colour,
            hatch=hatch,
            edgecolor=theme.paper,
            linewidth=0.6,
            label=f"{CATEGORIES[key]}  {_share(share)}",
        )
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, (_, seconds) in enumerate(bars):
        where = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "fontsize": 9}
        ax.annotate(text.duration(sum(seconds.values())), (left[i], i), color=theme.ink, **where)
    ax.set_yticks(range(len(bars)), [name for name, _ in bars])
    ax.set_ylim(max(1, len(bars)) - 0.5, -0.5)
    ax.set_xlim(0, max(left, default=0) * 1.13 or 1)
    ax.tick_params(axis="y", length=0, labelcolor=theme.ink)
    if used:
        figure.legend(
            loc="outside lower center", ncols=4, frameon=False, labelcolor=theme.ink, fontsize=9
        )
    else:
        ax.set_xticks([])
        say(ax, "no second has been counted yet", theme)


def seconds_height(histories: Sequence[History]) -> float:
    """Inches that the bars need."""
    bars = _bars(histories)
    used = {key for _, seconds in bars for key, value in seconds.items() if value > 0}
    return 1.0 + 0.36 * max(1, len(bars)) + 0.24 * math.ceil(len(used) / 4)


def _bars(histories: Sequence[History]) -> list[tuple[str, Mapping[str, float]]]:
    if len(histories) > 1:
        names = labels(histories)
        return [(no_math(n), h.seconds) for n, h in zip(names, histories, strict=True)]
    return [
        (
            f"phase {phase.number}   {text.plural(phase.ranks, 'rank')}, "
            f"batch {text.count(phase.global_batch)}",
            phase.seconds,
        )
        for history in histories
        for phase in history.phases
    ]


def _time_unit(longest: float) -> tuple[str, float]:
    if longest >= 3 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if longest >= 600 else ("seconds", 1.0)


def _share(fraction: float) -> str:
    return f"{100 * fraction:.0f} %" if fraction >= 0.0995 else f"{100 * fraction:.1f} %"
