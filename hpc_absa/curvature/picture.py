"""The spectrum as a figure: density, the layers' top eigenvalues, the loss along directions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpc_absa.curvature.spectrum import Spectrum

LINE = 0.14
"""Inches for a layer's name."""


def draw(found: Spectrum, path: Path) -> None:
    """Write the figure; the format follows the name (`.png`, `.svg`, `.pdf`)."""
    from matplotlib.figure import Figure

    panels = 1 + bool(found.layers) + bool(found.slices)
    height = max(4.0, LINE * len(found.layers))
    figure = Figure(figsize=(5.5 * panels, height), layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    _density(next(axes), found)
    if found.layers:
        _layers(next(axes), found)
    if found.slices:
        _slices(next(axes), found)
    figure.savefig(path, dpi=120)


def _density(axis: Any, found: Spectrum) -> None:
    density = found.density
    axis.semilogy(density.grid, density.density.clip(1e-12))
    axis.fill_between(
        density.grid,
        (density.density - density.error).clip(1e-12),
        (density.density + density.error).clip(1e-12),
        alpha=0.3,
    )
    for value in found.top.values:
        axis.axvline(value, color="tab:red", linewidth=0.8)
    axis.set_ylim(bottom=1e-7 * float(density.density.max(initial=1e-5)))
    axis.set(xlabel="eigenvalue", ylabel="density")
    low, high = found.density.negative_low, found.density.negative_high
    axis.set_title(f"{low:.0%} to {high:.0%} of the eigenvalues are negative")


def _layers(axis: Any, found: Spectrum) -> None:
    names = [layer.name for layer in found.layers]
    axis.barh(names, [layer.top for layer in found.layers])
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.tick_params(axis="y", labelsize=7)
    axis.set(xlabel="top eigenvalue of the layer's own block")


def _slices(axis: Any, found: Spectrum) -> None:
    for rank, line in enumerate(found.slices, 1):
        axis.plot(line.distances, line.losses, label=f"v{rank}, λ = {line.eigenvalue:.3g}")
    axis.set(xlabel="distance along the eigenvector", ylabel="loss")
    axis.legend()
