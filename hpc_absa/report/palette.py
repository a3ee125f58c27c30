"""Colours of pictures and pages: Okabe and Ito's, which colour-blind readers can tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#009E73"
ORANGE, SKY, PURPLE, YELLOW = "#E69F00", "#56B4E9", "#CC79A7", "#F0E442"


@dataclass(frozen=True)
class Theme:
    """The colours of one appearance; `page.py` uses the same ones."""

    name: str
    paper: str
    ink: str
    soft: str
    """Axes, secondary text."""
    grid: str
    band: str
    """Every other phase's background."""
    line: str
    """The one curve of a single run."""
    alarm: str
    mark: str
    """Growth points."""
    runs: tuple[str, ...]
    """One colour for each of several runs."""


LIGHT = Theme(
    name="light",
    paper="#ffffff",
    ink="#1c2126",
    soft="#5b6570",
    grid="#e3e7eb",
    band="#f1f4f7",
    line=BLUE,
    alarm=VERMILLION,
    mark=GREEN,
    runs=(BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, "#1c2126"),
)
DARK = Theme(
    name="dark",
    paper="#161a1f",
    ink="#e6eaee",
    soft="#9aa5b1",
    grid="#2b323a",
    band="#1f252c",
    line=SKY,
    alarm="#FF8A3D",
    mark="#2CC79A",
    runs=(SKY, "#FF8A3D", "#2CC79A", PURPLE, YELLOW, "#7FA8FF", "#e6eaee"),
)

CATEGORY_STYLE: Mapping[str, tuple[str, str]] = {
    "comp": (BLUE, ""),
    "comm": (SKY, ""),
    "adversarial": (PURPLE, ""),
    "hessian": (ORANGE, ""),
    "data": (GREEN, ""),
    "eval": ("#7ccfb5", ""),
    "checkpoint": (YELLOW, ""),
    "start": ("#8a949e", ""),
    "resize": (VERMILLION, ""),
    "lost": ("#6b1d1d", "////"),
    "other": ("#c3cad1", ""),
    "unmeasured": ("#e0e4e8", "\\\\\\\\"),
}
"""Colour and hatching of each category of seconds."""
