"""Robustness as a figure: accuracy by attack, sizes of the perturbations, and examples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_absa.adversarial.robustness import Examples, Robustness

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Of Okabe and Ito, which colour-blind readers can tell apart."""


def draw(
    found: Robustness,
    examples: Examples | None,
    classes: Sequence[str],
    pixels: Any,
    path: Path,
) -> None:
    """Write the figure as PNG.

    Args:
        found: what was measured.
        examples: of images, or None.
        classes: names.
        pixels: from inputs [k, C, H, W] to pixels from 0 to 1.
        path: file.
    """
    from matplotlib.figure import Figure

    count = len(examples.before) if examples else 0
    figure = Figure(figsize=(11, 4.2 + 3.9 * bool(count)), layout="constrained")
    top, *below = figure.subfigures(1 + bool(count), 1, squeeze=False)[:, 0]
    bars, curves = top.subplots(1, 2)
    _accuracy(bars, found)
    _sizes(curves, found)
    if examples and below:
        _examples(below[0], examples, classes, pixels)
    figure.savefig(path, dpi=120, metadata={"Software": "hpc-absa"})


def _accuracy(axis: Any, found: Robustness) -> None:
    names = ["none", *(result.attack for result in found.results)]
    values = [100 * found.accuracy, *(100 * result.accuracy for result in found.results)]
    colours = ["#999999", *(COLOURS[i % len(COLOURS)] for i in range(len(found.results)))]
    axis.barh(names, values, color=colours)
    axis.bar_label(axis.containers[0], fmt="%.1f", padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set(xlabel=f"accuracy under attack, % of {found.samples} test samples")


def _sizes(axis: Any, found: Robustness) -> None:
    for index, result in enumerate(found.results):
        sizes = np.sort(result.perturbations[(result.perturbations > 0) & ~result.robust])
        if len(sizes):
            share = 100 * np.arange(1, len(sizes) + 1) / max(1, found.samples)
            label = f"{result.attack} ({result.norm})"
            axis.step(sizes, share, where="post", label=label, color=COLOURS[index % len(COLOURS)])
    axis.set_xscale("log")
    axis.set(xlabel="relative perturbation ‖δ‖ / ‖x‖", ylabel="fooled with at most this, %")
    if axis.has_data():
        axis.legend(fontsize=8)


def _examples(figure: Any, examples: Examples, classes: Sequence[str], pixels: Any) -> None:
    figure.suptitle(f"Examples: {examples.attack}", fontsize=10)
    before, after = pixels(examples.before), pixels(examples.after)
    change = after - before
    scale = np.abs(change).reshape(len(change), -1).max(1)
    axes = figure.subplots(3, len(before), squeeze=False)
    for column in range(len(before)):
        shown = (before[column], 0.5 + change[column] / (2 * scale[column] or 1), after[column])
        titles = (
            classes[examples.targets[column]],
            f"change × {0.5 / (scale[column] or 1):.3g}",
            classes[examples.predicted[column]],
        )
        for axis, image, title in zip(axes[:, column], shown, titles, strict=True):
            axis.imshow(_as_image(image), cmap="gray", vmin=0, vmax=1)
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()


def _as_image(pixels: NDArray[Any]) -> NDArray[Any]:
    """[C, H, W] as [H, W, 3] or [H, W]."""
    clipped = pixels.clip(0, 1)
    return clipped.transpose(1, 2, 0) if len(clipped) == 3 else clipped[0]
