"""Numbers as people read them; a missing one is a dash."""

from __future__ import annotations

import math
from datetime import UTC, datetime

MISSING = "–"


def known(value: float | None) -> bool:
    """Whether there is a finite number to show."""
    return value is not None and math.isfinite(value)


def duration(seconds: float | None) -> str:
    """Seconds as `0.42 s`, `41.2 s`, `3 min 05 s`, `2 h 07 min`, `3 d 04 h`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
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


def count(value: float | None) -> str:
    """A whole number with thin spaces between groups of three digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{round(value):,}".replace(",", "\u202f")


def size(octets: float | None) -> str:
    """Bytes in decimal units, as disks are sold and `ls --si` shows."""
    if octets is None or not math.isfinite(octets):
        return MISSING
    for unit in ("B", "kB", "MB", "GB"):
        if octets < 999.5:
            return f"{octets:.0f} B" if unit == "B" else f"{octets:.3g} {unit}"
        octets /= 1000
    return f"{octets:.4g} TB"


def percent(fraction: float | None, digits: int = 2) -> str:
    """A fraction of one as a percentage."""
    if fraction is None or not math.isfinite(fraction):
        return MISSING
    return f"{100 * fraction:.{digits}f} %"


def number(value: float | None, digits: int = 4) -> str:
    """Any real number to so many significant digits."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.{digits}g}".replace("-", "\u2212") if value < 0 else f"{value:.{digits}g}"


def epoch(value: float | None) -> str:
    """Epochs visited, fractions only where there are any."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:.2f}".rstrip("0").rstrip(".")


def moment(unix: float | None) -> str:
    """A point in time, in UTC so that a page reads the same everywhere."""
    if unix is None or not math.isfinite(unix):
        return MISSING
    return datetime.fromtimestamp(unix, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def plural(value: float, word: str) -> str:
    """`1 rank`, `4 ranks`."""
    return f"{count(value)} {word}" + ("" if value == 1 else "s")
