"""A spectrum as JSON, HDF5 and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from hpc_absa.curvature.spectrum import Spectrum
from hpc_absa.curvature.stochastic import Trace
from hpc_absa.errors import UsageError
from hpc_absa.rundir.files import replacing

FORMAT = "hpc-absa-spectrum"

DENSITY_LIMITS = (0.1, 0.01, 0.001, 1e-4)
"""Rows of the density's table, relative to the largest eigenvalue by magnitude."""


def to_dict(record: Any, *, vectors: bool = False) -> Any:
    """A record as JSON values: arrays as lists, NaN as None, vectors [k, P] only on request."""
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


def save(spectrum: Spectrum, path: Path) -> None:
    """Write HDF5: records as groups, arrays as datasets, numbers as attributes."""
    import h5py

    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        file.attrs["format"] = FORMAT
        _write(file, spectrum)


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


def require_replaceable(tables: Path, figure: Path) -> None:
    """Refuse to replace files that are not a spectrum, and to write where no folder is.

    A figure counts as one if the tables beside it are.

    Raises:
        UsageError: there is such a file, such as a checkpoint, or no folder.
    """
    import h5py

    if not tables.parent.is_dir():
        raise UsageError(f"{tables}: no folder {tables.parent} to write to; make it first")
    existing = tables if tables.exists() else figure
    if not existing.exists():
        return
    try:
        with h5py.File(existing, "r", locking=False) as file:
            ours = file.attrs.get("format") == FORMAT
    except Exception:  # h5py raises many types for files that it cannot read
        ours = False
    if not ours:
        raise UsageError(
            f"{existing}: exists and is not a spectrum of hpc-absa; choose another --out"
        )


def heading(spectrum: Spectrum) -> str:
    """The whole Hessian in four lines."""
    density, count = spectrum.density, spectrum.parameters
    low = max(round(density.negative_low * count), density.negative_least)
    high = round(density.negative_high * count)
    return (
        f"{spectrum.matrix.title()} matrix of the mean loss over {spectrum.samples} samples, "
        f"{count} parameters\n"
        f"loss                 {spectrum.loss:.5g}\n"
        f"trace                {_plus_minus(spectrum.trace)}\n"
        f"negative directions  {density.negative * count:.0f} of {count}, between {low} and "
        f"{high}; the lowest eigenvalue is {spectrum.lowest:.4g} or less"
    )


def tables(spectrum: Spectrum) -> list[Table]:
    """Everything except vectors, nodes and curves."""
    optional = [_layers] * bool(spectrum.layers) + [_slices] * bool(spectrum.slices)
    return [make(spectrum) for make in (_top, _density, *optional)]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _top(spectrum: Spectrum) -> Table:
    table = _table("Top eigenvalues", "#", "λ", "‖Hv − λv‖/|λ|", "estimated error", "converged")
    top = spectrum.top
    rows = zip(top.values, top.residuals, top.errors, top.converged, strict=True)
    for rank, (value, residual, error, converged) in enumerate(rows, 1):
        numbers = f"{value:.5g}", f"{residual:.1e}", f"{error:.1e}"
        table.add_row(str(rank), *numbers, "yes" if converged else "no")
    return table


def _density(spectrum: Spectrum) -> Table:
    table = _table("Density", "below", "share of the eigenvalues", "at least", "at most")
    largest = max(abs(float(spectrum.top.values[0])), abs(spectrum.lowest))
    limits = [largest * limit for limit in DENSITY_LIMITS]
    for limit in (*(-limit for limit in limits), *reversed(limits)):
        shares = (f"{100 * share:.2f} %" for share in spectrum.density.below(limit))
        table.add_row(f"{limit:.3g}", *shares)
    return table


def _layers(spectrum: Spectrum) -> Table:
    title = "Layers: each parameter's diagonal block of the Hessian"
    table = _table(title, "parameter", "size", "top λ", "residual", "trace", "negative")
    table.columns[0].justify, table.columns[0].no_wrap = "left", False
    table.columns[0].overflow = "fold"
    for layer in spectrum.layers:
        low, high = 100 * layer.density.negative_low, 100 * layer.density.negative_high
        table.add_row(
            layer.name, str(layer.parameters), f"{layer.top:.4g}", f"{layer.residual:.1e}",
            _plus_minus(layer.trace), f"{low:.0f} – {high:.0f} %",
        )  # fmt: skip
    return table


def _slices(spectrum: Spectrum) -> Table:
    names = [f"along v{rank}" for rank in range(1, len(spectrum.slices) + 1)]
    columns = (column for name in names for column in ("t", name))
    table = _table("Loss along the top eigenvectors", *columns)
    points = len(spectrum.slices[0].losses)
    for index in sorted({round(i * (points - 1) / 8) for i in range(9)}):  # evenly spaced
        cells = ((line.distances[index], line.losses[index]) for line in spectrum.slices)
        table.add_row(*(cell for t, loss in cells for cell in (f"{t:.3g}", f"{loss:.4g}")))
    return table


def _plus_minus(trace: Trace) -> str:
    return f"{trace.value:.4g} ± {trace.error:.2g}"
