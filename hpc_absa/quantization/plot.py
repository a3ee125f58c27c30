"""Sensitivities and the allocation as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hpc_absa.quantization.allocation import Front
from hpc_absa.quantization.sensitivity import Sensitivity

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of Okabe and Ito, which colour-blind readers can tell apart."""


def draw(
    layers: Sequence[Sensitivity],
    bits: Sequence[int],
    chosen: Mapping[str, int],
    front: Front | None,
    point: tuple[float, float],
    path: Path,
) -> None:
    """Write the figure as PNG.

    Args:
        layers: of the whole network.
        bits: the choices.
        chosen: bits by layer.
        front: of size and ΣΩ, or None.
        point: size in bytes and ΣΩ of the allocation.
        path: file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(9.0, 4 + 0.22 * len(layers)), 8), layout="constrained")
    rows = figure.subplots(3 if front else 2, 1)
    _bars(rows[0], layers, "trace / n", [s.trace.value / s.layer.parameters for s in layers],
          [s.trace.error / s.layer.parameters for s in layers])  # fmt: skip
    _omegas(rows[1], layers, bits, chosen)
    if front:
        _front(rows[2], front, point)
    figure.savefig(path, dpi=120, metadata={"Software": "hpc-absa"})


def _bars(axis: Any, layers: Sequence[Sensitivity], label: str, values: Any, errors: Any) -> None:
    places = np.arange(len(layers))
    axis.bar(places, values, yerr=errors, color=COLOURS[5], ecolor="#5b6570", capsize=2)
    axis.set_xticks(places, [s.layer.name for s in layers], rotation=90, fontsize=7)
    axis.set(ylabel=label, title="average eigenvalue of the layer's Hessian block")


def _omegas(
    axis: Any, layers: Sequence[Sensitivity], bits: Sequence[int], chosen: Mapping[str, int]
) -> None:
    places = np.arange(len(layers))
    for index, number in enumerate(bits):
        values = np.array([s.omega[index] for s in layers])
        colour = COLOURS[index % len(COLOURS)]
        axis.plot(places, values, "o-", color=colour, label=f"{number} bits", markersize=3)
        mine = np.array([chosen[s.layer.name] == number for s in layers])
        axis.plot(places[mine], values[mine], "o", color=colour, markersize=8)
    axis.set_yscale("log")
    axis.set_xticks(places, [s.layer.name for s in layers], rotation=90, fontsize=7)
    axis.set(ylabel="sensitivity Ω", title="large marks: the chosen bits")
    axis.legend()


def _front(axis: Any, front: Front, point: tuple[float, float]) -> None:
    axis.plot(front.costs / 1e6, front.omegas, color=COLOURS[0], drawstyle="steps-post")
    axis.plot(point[0] / 1e6, point[1], "o", color=COLOURS[1], label="chosen")
    axis.set_yscale("log")
    axis.set(xlabel="size, MB", ylabel="ΣΩ", title="Pareto front of the layers that can choose")
    axis.legend()
