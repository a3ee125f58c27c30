"""Numbers as text for tables, pages and terminals; a missing or non-finite one is a dash."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Concatenate, ParamSpec

if TYPE_CHECKING:
    from jinja2 import Environment

P = ParamSpec("P")
MISSING = "–"


def _dash_if_missing(
    function: Callable[Concatenate[float, P], str],
) -> Callable[Concatenate[float | None, P], str]:
    @functools.wraps(function)
    def formatted(value: float | None, /, *args: P.args, **kwargs: P.kwargs) -> str:
        if value is None or not math.isfinite(value):
            return MISSING
        return function(value, *args, **kwargs)

    return formatted


@_dash_if_missing
def duration(seconds: float) -> str:
    """Seconds as `0.42 s`, `41.2 s`, `3 min 05 s`, `2 h 07 min`, `3 d 04 h`."""
    if seconds < 0.995:
        return f"{seconds:.2f} s"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"


@_dash_if_missing
def count(value: float) -> str:
    """A whole number with thin spaces between groups of three digits."""
    return f"{round(value):,}".replace(",", "\u202f")


@_dash_if_missing
def size(n_bytes: float) -> str:
    """Bytes in decimal units, as `ls --si` shows them."""
    for unit in ("B", "kB", "MB", "GB"):
        if n_bytes < 999.5:
            return f"{n_bytes:.0f} B" if unit == "B" else f"{n_bytes:.3g} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.4g} TB"


@_dash_if_missing
def percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f} %"


@_dash_if_missing
def number(value: float, digits: int = 4) -> str:
    text = f"{value:.0f}" if 10**digits <= abs(value) < 1e7 else f"{value:.{digits}g}"
    return text.replace("-", "\u2212") if value < 0 else text


@_dash_if_missing
def epoch(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


@_dash_if_missing
def moment(unix: float) -> str:
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def plural(value: float, noun: str) -> str:
    return f"{count(value)} {noun}" + ("" if value == 1 else "s")


def change(first: float, last: float) -> str:
    """`1 → 4`, or the count alone where it did not change."""
    return count(first) if first == last else f"{count(first)} → {count(last)}"


@functools.cache
def templates() -> Environment:
    """The templates of this package; autoescape is on, the formats of this module are filters."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("hpc_absa.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    formats = (duration, count, size, percent, number, epoch, moment, plural, change)
    environment.filters |= {f.__name__: f for f in formats}
    return environment
