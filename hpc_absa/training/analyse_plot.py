"""The analysis of one run or several as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#1c2126")
"""Of Okabe and Ito, which colour-blind readers can tell apart."""

Point = Mapping[str, Any]


def draw(points: Sequence[Point], path: Path) -> None:
    """Write the figure as PNG."""
    from matplotlib.figure import Figure

    runs: dict[str, list[Point]] = {}
    for point in points:
        runs.setdefault(point["run"], []).append(point)
    surfaces = [(name, run[-1]) for name, run in runs.items() if run[-1].get("surface")]
    figure = Figure(figsize=(19, 8 + 3.6 * bool(surfaces)), layout="constrained")
    parts = figure.subfigures(1 + bool(surfaces), 1, squeeze=False,
                              height_ratios=[8, 3.6][: 1 + bool(surfaces)])[:, 0]  # fmt: skip
    axes = parts[0].subplots(2, 5)
    single = all(len(run) == 1 for run in runs.values())
    over = partial(_scalars, runs=runs, by_batch=single)
    over(axes[0, 0], value=_top, title="top eigenvalue λ₁", log=True)
    over(axes[0, 1], value=lambda p: p["trace"], title="trace", log=True)
    over(axes[0, 2], value=_negative, title="negative eigenvalues, %")
    over(axes[0, 3], value=_accuracy, title="test accuracy, %")
    if single:
        over(axes[0, 4], value=lambda p: p["lowest"], title="lowest Ritz value")
    else:
        title = "top eigenvalue λ₁, newest checkpoint"
        _scalars(axes[0, 4], runs, _top, title, by_batch=True)
    _slices(axes[1, 0], runs)
    _densities(axes[1, 1], runs)
    names = list(runs[next(iter(runs))][-1]["robust"])
    limited = [name for name in names if not name.startswith("tr-")]
    _bars(axes[1, 2], runs, ["clean", *limited], _accuracy_under)
    axes[1, 2].set_title("accuracy under attack, %")
    _bars(axes[1, 3], runs, [name for name in names if name not in limited], _perturbation)
    axes[1, 3].set_title("mean ‖δ‖/‖x‖ that a trust-region attack needs")
    over(axes[1, 4], value=lambda p: p["train_loss"], title="training loss")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    parts[0].legend(handles, labels, loc="outside upper center", ncols=min(6, len(labels)))
    if surfaces:
        _surfaces(parts[1], surfaces)
    figure.savefig(path, dpi=120, metadata={"Software": "hpc-absa"})


def _top(point: Point) -> float | None:
    value: float | None = point["eigenvalues"][0]
    return value


def _negative(point: Point) -> float | None:
    share = point["negative"][1]
    return None if share is None else 100 * share


def _accuracy(point: Point) -> float | None:
    return None if point["test_accuracy"] is None else 100 * point["test_accuracy"]


def _colours(runs: Mapping[str, Any]) -> dict[str, str]:
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(runs)}


def _scalars(
    axis: Any, runs: Any, value: Any, title: str, log: bool = False, by_batch: bool = False
) -> None:
    """A number of each checkpoint over epochs, or of each run's newest over its largest batch."""
    for name, colour in _colours(runs).items():
        points = runs[name][-1:] if by_batch else runs[name]
        pairs = [(p["largest_batch" if by_batch else "epoch"], value(p)) for p in points]
        pairs = [(x, y) for x, y in pairs if y is not None]
        xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
        axis.plot(xs, ys, "o-", color=colour, label=name, markersize=4)
    if log and axis.has_data() and all(min(line.get_ydata(), default=1) > 0 for line in axis.lines):
        axis.set_yscale("log")
    if by_batch:
        axis.set_xscale("log", base=2)
    axis.set(xlabel="largest batch" if by_batch else "epoch", title=title)


def _slices(axis: Any, runs: Any) -> None:
    for name, colour in _colours(runs).items():
        for line in runs[name][-1]["slices"][:1]:
            axis.plot(line["distances"], line["losses"], color=colour)
    axis.set(xlabel="distance along the top eigenvector", title="training loss, newest checkpoint")


def _densities(axis: Any, runs: Any) -> None:
    for name, colour in _colours(runs).items():
        density = runs[name][-1]["density"]
        pairs = zip(density["grid"], density["density"], strict=True)
        kept = [(x, y) for x, y in pairs if x is not None and y]
        if kept:
            axis.semilogy(*np.array(kept).T, color=colour)
    highest = max((line.get_ydata().max() for line in axis.lines), default=1.0)
    axis.set_ylim(1e-7 * highest, 10 * highest)
    axis.set(xlabel="eigenvalue", title="density, newest checkpoint")


def _bars(axis: Any, runs: Any, attacks: Sequence[str], value: Any) -> None:
    """A group of bars for each name, one bar for each run's newest checkpoint."""
    width = 0.8 / len(runs)
    for index, (run, colour) in enumerate(_colours(runs).items()):
        places = [i + index * width for i in range(len(attacks))]
        axis.bar(places, [value(runs[run][-1], name) for name in attacks], width, color=colour)
    axis.set_xticks([i + 0.4 - width / 2 for i in range(len(attacks))], attacks, fontsize=8)


def _accuracy_under(point: Point, attack: str) -> float:
    return 100 * ({"clean": point["clean"], **point["robust"]}.get(attack) or 0.0)


def _perturbation(point: Point, attack: str) -> float:
    return float(point["perturbation"].get(attack) or 0.0)


def _surfaces(figure: Any, surfaces: Sequence[tuple[str, Point]]) -> None:
    axes = figure.subplots(1, len(surfaces), squeeze=False)[0]
    for axis, (name, point) in zip(axes, surfaces, strict=True):
        grid = point["surface"]
        filled = [[float("nan") if v is None else v for v in row] for row in grid["losses"]]
        columns = [list(column) for column in zip(*filled, strict=True)]
        drawn = axis.contourf(grid["first"], grid["second"], columns, levels=20)
        figure.colorbar(drawn, ax=axis)
        axis.set(xlabel="v₁", ylabel="v₂", title=f"loss, {name}")
