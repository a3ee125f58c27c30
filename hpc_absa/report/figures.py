"""Pictures of runs, in a theme each, so that a page can show them on light and dark paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hpc_absa.report.bars import draw_seconds, seconds_height
from hpc_absa.report.canvas import blank, png, svg_uri
from hpc_absa.report.curves import draw_course
from hpc_absa.report.history import History
from hpc_absa.report.palette import LIGHT, Theme

__all__ = ["course_figure", "overview_figure", "png", "seconds_figure", "svg_uri"]

WIDTH = 9.0
"""Inches; at 100 dots an inch a page's column."""
COURSE_HEIGHT = 9.2
Draw = Callable[[Sequence[History], Theme], Any]
"""A figure of one run or several, in a theme."""


def course_figure(histories: Sequence[History], theme: Theme = LIGHT) -> Any:
    """Learning rate, batch, ranks, eigenvalue and accuracy over epochs, one panel each.

    One run has its phases shaded, its threshold drawn and its growth points marked; several runs
    are laid over each other, a colour each.
    """
    figure = blank(WIDTH, COURSE_HEIGHT, theme)
    draw_course(figure, histories, theme)
    return figure


def seconds_figure(histories: Sequence[History], theme: Theme = LIGHT) -> Any:
    """Where each second went: a bar for each phase of one run, or for each of several runs."""
    figure = blank(WIDTH, seconds_height(histories), theme)
    draw_seconds(figure, histories, theme)
    return figure


def overview_figure(histories: Sequence[History], theme: Theme = LIGHT) -> Any:
    """Both in one picture, for where a page cannot go."""
    low = seconds_height(histories)
    figure = blank(WIDTH, COURSE_HEIGHT + low, theme)
    top, bottom = figure.subfigures(2, 1, height_ratios=[COURSE_HEIGHT, low])
    for part in (top, bottom):
        part.set_facecolor(theme.paper)
    draw_course(top, histories, theme)
    draw_seconds(bottom, histories, theme)
    return figure
