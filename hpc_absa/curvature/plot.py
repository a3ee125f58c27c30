"""The spectrum as a figure: density, the layers' top eigenvalues, the loss along eigenvectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hpc_absa.curvature.spectrum import Spectrum


def draw(spectrum: Spectrum, path: Path) -> None:
    """Write the figure; the extension gives the format (`.png`, `.svg`, `.pdf`)."""
    from matplotlib.figure import Figure

    panels = 1 + bool(spectrum.layers) + bool(spectrum.slices)
    height = max(4.0, 0.14 * len(spectrum.layers))  # inches, so that the layers' names fit
    figure = Figure(figsize=(5.5 * panels, height), layout="constrained")
    axes = iter(figure.subplots(1, panels, squeeze=False)[0])
    _density(next(axes), spectrum)
    if spectrum.layers:
        _layers(next(axes), spectrum)
    if spectrum.slices:
        _slices(next(axes), spectrum)
    figure.savefig(path, dpi=120)


def _density(axis: Any, spectrum: Spectrum) -> None:
    curve = spectrum.density
    axis.semilogy(curve.grid, curve.density.clip(1e-12))
    low, high = curve.density - curve.error, curve.density + curve.error
    axis.fill_between(curve.grid, low.clip(1e-12), high.clip(1e-12), alpha=0.3)
    for value in spectrum.top.values:
        axis.axvline(value, color="tab:red", linewidth=0.8)
    highest = curve.density.max(initial=1e-5, where=np.isfinite(curve.density))
    axis.set_ylim(bottom=1e-7 * float(highest))
    axis.set(xlabel="eigenvalue", ylabel="density")
    axis.set_title(
        f"{curve.negative_low:.0%} to {curve.negative_high:.0%} of the eigenvalues are negative"
    )


def _layers(axis: Any, spectrum: Spectrum) -> None:
    axis.barh([layer.name for layer in spectrum.layers], [layer.top for layer in spectrum.layers])
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.tick_params(axis="y", labelsize=7)
    axis.set(xlabel="top eigenvalue of the layer's diagonal block")


def _slices(axis: Any, spectrum: Spectrum) -> None:
    for rank, line in enumerate(spectrum.slices, 1):
        axis.plot(line.distances, line.losses, label=f"v{rank}, λ = {line.eigenvalue:.3g}")
    axis.set(xlabel="distance along the eigenvector", ylabel="loss")
    axis.legend()
