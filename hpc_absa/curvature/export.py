"""A spectrum as JSON, as HDF5 and as tables for people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from hpc_absa.curvature.spectrum import Spectrum
from hpc_absa.errors import UsageError


def to_dict(record: Any, *, vectors: bool = False) -> Any:
    """A record as what JSON can say: arrays as lists, NaN as None, vectors [k, P] only if asked."""
    if is_dataclass(record):
        kept = [f.name for f in fields(record) if vectors or f.name != "vectors"]
        return {name: to_dict(getattr(record, name), vectors=vectors) for name in kept}
    if isinstance(record, np.ndarray):
        return to_dict(record.tolist(), vectors=vectors)
    if isinstance(record, Sequence) and not isinstance(record, str):
        return [to_dict(item, vectors=vectors) for item in record]
    if isinstance(record, float) and not math.isfinite(record):
        return None
    return record


def save(found: Spectrum, path: Path) -> None:
    """All of it as HDF5: a group a record, a dataset an array, an attribute a number."""
    import h5py

    with h5py.File(path, "w") as file:
        file.attrs["format"] = FORMAT
        _write(file, found)


def require_replaceable(path: Path) -> None:
    """Refuse to replace a file that is no spectrum of ours.

    Raises:
        UsageError: there is such a file, as a checkpoint or somebody's data.
    """
    import h5py

    if not path.exists():
        return
    try:
        with h5py.File(path, "r", locking=False) as file:
            ours = file.attrs.get("format") == FORMAT
    except Exception:  # h5py has no one kind of error for what it cannot make sense of
        ours = False
    if not ours:
        raise UsageError(f"{path}: exists, and is no spectrum of hpc-absa; choose another --out")


def _write(group: Any, record: Any) -> None:
    for item in fields(record):
        value = getattr(record, item.name)
        if isinstance(value, np.ndarray):
            group[item.name] = value
        elif is_dataclass(value):
            _write(group.create_group(item.name), value)
        elif isinstance(value, tuple):
            for index, part in enumerate(value):
                _write(group.create_group(f"{item.name}/{index:04d}"), part)
        else:
            group.attrs[item.name] = value


FORMAT = "hpc-absa-spectrum"

SHARES = (0.1, 0.01, 0.001, 1e-4)
"""Edges of the density's table, in units of the largest eigenvalue by magnitude."""


def tables(found: Spectrum) -> list[Table]:
    """Everything but vectors, nodes and curves, for people."""
    made = [_top(found), _density(found)]
    if found.layers:
        made.append(_layers(found))
    if found.slices:
        made.append(_slices(found))
    return made


def heading(found: Spectrum) -> str:
    """The whole Hessian in a few lines."""
    density, count = found.density, found.parameters
    low, high = round(density.negative_low * count), round(density.negative_high * count)
    low = max(low, density.negative_least)
    return "\n".join(
        [
            f"{found.matrix.title()} matrix of the mean loss over {found.samples} samples, "
            f"{count} parameters",
            f"loss                 {found.loss:.5g}",
            f"trace                {_pm(found.trace.value, found.trace.error)}",
            f"negative directions  {density.negative * count:.0f} of {count}, between {low} and "
            f"{high}; the lowest eigenvalue is {found.lowest:.4g} or less",
        ]
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _top(found: Spectrum) -> Table:
    table = _table("Top eigenvalues", "#", "λ", "‖Hv − λv‖/|λ|", "estimated error", "converged")
    top = found.top
    rows = zip(top.values, top.residuals, top.errors, top.converged, strict=True)
    for rank, (value, residual, error, converged) in enumerate(rows, 1):
        told = "yes" if converged else "no"
        table.add_row(str(rank), f"{value:.5g}", f"{residual:.1e}", f"{error:.1e}", told)
    return table


def _density(found: Spectrum) -> Table:
    """How many of the eigenvalues lie below limits that are a decade apart."""
    table = _table("Density", "below", "share of the eigenvalues", "at least", "at most")
    largest = max(abs(float(found.top.values[0])), abs(found.lowest))
    above = [largest * share for share in SHARES]
    for limit in (*(-edge for edge in above), *reversed(above)):
        shares = (f"{100 * share:.2f} %" for share in found.density.below(limit))
        table.add_row(f"{limit:.3g}", *shares)
    return table


def _layers(found: Spectrum) -> Table:
    table = Table(title="Layers: each parameter's own block of the Hessian", title_justify="left")
    table.add_column("parameter", overflow="fold")
    for name in ("size", "top λ", "residual", "trace", "negative"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in found.layers:
        density = layer.density
        low, high = 100 * density.negative_low, 100 * density.negative_high
        table.add_row(
            layer.name, str(layer.parameters), f"{layer.top:.4g}", f"{layer.residual:.1e}",
            _pm(layer.trace.value, layer.trace.error), f"{low:.0f} – {high:.0f} %",
        )  # fmt: skip
    return table


def _slices(found: Spectrum) -> Table:
    """The loss at the ends, half-way and in the middle of each direction."""
    names = [f"along v{rank}" for rank in range(1, len(found.slices) + 1)]
    table = _table("Loss along the top eigenvectors", *(w for n in names for w in ("t", n)))
    points = len(found.slices[0].losses)
    for index in sorted({round(i * (points - 1) / 8) for i in range(9)}):
        cells = ((line.distances[index], line.losses[index]) for line in found.slices)
        table.add_row(*(word for t, loss in cells for word in (f"{t:.3g}", f"{loss:.4g}")))
    return table


def _pm(value: float, error: float) -> str:
    """A number with its standard error."""
    return f"{value:.4g} ± {error:.2g}"
