"""What all pictures share: canvas, look of a panel, output. Agg only, no display needed."""

from __future__ import annotations

import base64
import io
from typing import Any

from hpc_absa.report.palette import Theme


def blank(width: float, height: float, theme: Theme) -> Any:
    """An empty figure, sizes in inches, that no window belongs to."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png(figure: Any, dots_per_inch: int = 130) -> bytes:
    """The figure as a PNG."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dots_per_inch, facecolor=figure.get_facecolor())
    return out.getvalue()


def svg_uri(figure: Any) -> str:
    """The figure as an SVG in a `data:` URI, letters as outlines so that no font is needed."""
    import matplotlib as mpl

    out = io.BytesIO()
    nobody = {"Creator": None, "Date": None, "Format": None, "Type": None}
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "hpc-absa"}):
        figure.savefig(out, format="svg", facecolor=figure.get_facecolor(), metadata=nobody)
    return "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()


def dress(ax: Any, title: str, theme: Theme) -> None:
    """One look for all panels: title over the panel, faint grid, no box."""
    ax.set_title(title, loc="left", y=1.0, fontsize=10, color=theme.ink, pad=5)
    ax.set_facecolor(theme.paper)
    ax.grid(visible=True, color=theme.grid, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(colors=theme.soft, labelsize=9, length=3, which="major")
    ax.tick_params(length=0, labelleft=False, which="minor")
    for side, spine in ax.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.soft)


def say(ax: Any, words: str, theme: Theme) -> None:
    """Words in the middle of a panel that has nothing to show."""
    ax.text(
        0.5,
        0.5,
        words,
        transform=ax.transAxes,
        ha="center",
        va="center",
        color=theme.soft,
        size=9.5,
    )


def no_math(words: str) -> str:
    """A user's dollar signs are no formula."""
    return words.replace("$", r"\$")
