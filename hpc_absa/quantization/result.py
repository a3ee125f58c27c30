"""The result of quantization as records, tables, JSON and files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from hpc_absa.curvature.export import to_dict
from hpc_absa.quantization import plot, torch_ao
from hpc_absa.quantization.allocation import Front, Problem
from hpc_absa.quantization.fake import Ranges
from hpc_absa.quantization.sensitivity import Sensitivity
from hpc_absa.rundir.files import write_atomic

FRONT_ROWS = 200
"""Points of the front in the JSON output."""


@dataclass(frozen=True)
class Measured:
    """One quantized network."""

    name: str
    size: float
    """Bytes of the weights."""
    bops: float
    """MACs · weight bits · activation bits / 32²."""
    latency: float | None
    """ms, of the layers that can choose."""
    omega: float
    """ΣΩ of the layers that can choose."""
    accuracy: float | None
    """On the test samples; None where the job measures none."""
    loss: float | None


@dataclass(frozen=True)
class Check:
    """How well Ω predicts what quantization does."""

    loss: float
    """Of the float network on the training samples."""
    rises: tuple[float, ...]
    """[L], of that loss, when one layer's weight alone has the fewest bits."""
    quadratic_rises: tuple[float, ...]
    """[L], their part of even order: the mean over the change of the weight and its opposite. Ω
    estimates it; the rest of a rise is the gradient's, which is zero at a minimum."""
    rank_correlation: float
    """Spearman's, between Ω and the quadratic rises."""
    plain_rank_correlation: float
    """Spearman's, between Ω and the rises."""
    chosen_loss: float
    """Of the allocation, on the same samples."""
    random_losses: tuple[float, ...]
    """Of random allocations of the same size."""


@dataclass(frozen=True)
class Quantization:
    """The result of the command; the same on all ranks."""

    origin: str
    bits: tuple[int, ...]
    layers: tuple[Sensitivity, ...]
    fixed: tuple[str, ...]
    """Layers outside the program: the first and the last have the most bits."""
    equal: tuple[tuple[str, ...], ...]
    """Layers with equal bits, because their outputs are added."""
    limits: Mapping[str, float]
    """In the units of the cost, of the layers that can choose."""
    allocation: Mapping[str, int]
    """Bits by layer."""
    measured: tuple[Measured, ...]
    front: Front | None = None
    check: Check | None = None
    files: tuple[str, ...] = field(default=())


def tables(result: Quantization) -> Iterator[Table]:
    """The layers, the networks, and the check."""
    columns = [f"Ω, {b} bits" for b in result.bits]
    table = _table(
        "Layers", "layer", "weights", "MACs", "trace", *columns, "bits", caption=_groups(result)
    )
    for s in result.layers:
        table.add_row(
            s.layer.name, str(s.layer.parameters), f"{s.layer.macs:.3g}",
            f"{s.trace.value:.4g} ± {s.trace.error:.2g}", *(f"{o:.3g}" for o in s.omega),
            f"{result.allocation[s.layer.name]}{'*' if s.layer.name in result.fixed else ''}",
        )  # fmt: skip
    yield table
    limits = ", ".join(f"{cost} ≤ {value:.5g}" for cost, value in result.limits.items())
    title = f"Networks; the mixed one minimises ΣΩ with {limits} in the layers that can choose"
    table = _table(
        title, "network", "size, MB", "BOPS, M", "latency, ms", "ΣΩ", "accuracy %", "loss"
    )
    for m in result.measured:
        latency = "" if m.latency is None else f"{m.latency:.4g}"
        table.add_row(
            m.name, f"{m.size / 1e6:.4g}", f"{m.bops / 1e6:.4g}", latency, f"{m.omega:.3g}",
            "" if m.accuracy is None else f"{100 * m.accuracy:.2f}",
            "" if m.loss is None else f"{m.loss:.4f}",
        )  # fmt: skip
    yield table
    if check := result.check:
        table = _table("Check on the training samples", "quantity", "value")
        title = f"rank correlation of Ω and the rise with {result.bits[0]} bits in one layer"
        table.add_row(f"{title}, quadratic part", f"{check.rank_correlation:.3f}")
        table.add_row(title, f"{check.plain_rank_correlation:.3f}")
        table.add_row("loss of the float network", f"{check.loss:.5g}")
        table.add_row("loss of the mixed network", f"{check.chosen_loss:.5g}")
        if check.random_losses:
            count, better = (
                len(check.random_losses),
                sum(loss < check.chosen_loss for loss in check.random_losses),
            )
            table.add_row(
                f"median loss of {count} random ones", f"{np.median(check.random_losses):.5g}"
            )
            table.add_row("random ones that are better", str(better))
        yield table


def _groups(result: Quantization) -> str:
    lines = [f"* outside the program: {result.bits[-1]} bits"]
    lines += [f"equal bits, as they are added: {', '.join(group)}" for group in result.equal]
    return "\n".join(lines)


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", overflow="fold")
    return table


def as_dict(result: Quantization) -> dict[str, Any]:
    """As JSON values; the front with at most `FRONT_ROWS` of its points."""
    parts = {key: value for key, value in vars(result).items() if key not in ("front", "layers")}
    layers = [
        {**to_dict(s.layer), "trace": to_dict(s.trace), "squared_errors": s.errors.tolist(),
         "omega": s.omega.tolist()}
        for s in result.layers
    ]  # fmt: skip
    found = {key: dict(v) if isinstance(v, Mapping) else to_dict(v) for key, v in parts.items()}
    found["layers"] = layers
    if (front := result.front) is not None:
        step = max(1, math.ceil(len(front.costs) / FRONT_ROWS))
        found["front"] = {
            "points": len(front.costs),
            "exact": front.exact,
            "size": front.costs[::step].tolist(),
            "omega": front.omegas[::step].tolist(),
        }
    return found


def write(
    result: Quantization, problem: Problem, choice: Sequence[int], ranges: Ranges, out: Path
) -> list[str]:
    """The allocation as JSON, and the figure; their paths."""
    allocation = {
        "format": "hpc-absa-allocation",
        "weights": "symmetric, one scale per output channel; batch norm folded",
        "activations": "affine, one range per layer: its input",
        "layers": {
            name: {"bits": bits, **to_dict(ranges[name][bits])}
            for name, bits in result.allocation.items()
        },
    }
    if torch_ao.available():
        allocation["torch.ao.quantization"] = {
            name: {
                "weight": torch_ao.weight_settings(bits),
                "activation": torch_ao.activation_settings(bits),
            }
            for name, bits in result.allocation.items()
        }
    file, figure = Path(f"{out}.json"), Path(f"{out}.png")
    write_atomic(file, json.dumps(allocation, indent=1))
    point = problem.total("size", choice), problem.omega(choice)
    plot.draw(result.layers, result.bits, result.allocation, result.front, point, figure)
    return [str(file), str(figure)]
