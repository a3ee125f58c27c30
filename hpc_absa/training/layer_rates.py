"""A learning rate for each layer, from the curvature of the loss in it at the last decision point.

"Not all layers should have the same learning rate" (the ABSA talk): a flat layer can take longer
steps than a sharp one. The rate of a weight is the schedule's times a factor

    f = (c̄ / c)^½, within [1 / bound, bound]

where c is the curvature in that weight, and c̄ the geometric mean of it over all weights. Vectors
(biases, normalizations) keep the schedule's rate. The factors are in the checkpoint, as options of
the optimizer's groups.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hpc_absa.training.layer_curvature import LayerCurvature, Measure
from hpc_absa.training.step import StepEngine

FACTOR = "lr_factor"
"""Option of a parameter group."""

FLOOR = 1e-6
"""Smallest curvature, relative to the largest: also of a saddle's, which is negative."""


def split_groups(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter a group of its own, with the options of its group."""
    groups = [{**g, "params": [p]} for g in optimizer.param_groups for p in g["params"]]
    optimizer.param_groups[:] = groups


def factors(curvatures: Mapping[str, float], bound: float) -> dict[str, float]:
    """f of each weight, from its curvature c; all 1 where no curvature is positive and finite."""
    largest = max(curvatures.values(), default=0.0)
    if not (largest > 0 and all(map(math.isfinite, curvatures.values()))):
        return dict.fromkeys(curvatures, 1.0)
    logs = {name: math.log(max(c, FLOOR * largest)) for name, c in curvatures.items()}
    mean = sum(logs.values()) / len(logs)
    limit = math.log(bound)
    return {name: math.exp(min(limit, max(-limit, (mean - log) / 2))) for name, log in logs.items()}


@dataclass
class LayerRates:
    """Sets the factors."""

    engine: StepEngine
    """Whose optimizer has each parameter in a group of its own."""
    curvature: LayerCurvature
    measure: Measure
    bound: float
    """Of the factors, above 1."""

    def update(self, seed: int) -> dict[str, Any]:
        """Set the factors (a collective); returns the fields of the event."""
        found = factors(self.curvature.of(self.measure, seed), self.bound)
        names = {id(p): name for name, p in self.curvature.model.named_parameters()}
        for group in self.engine.optimizer.param_groups:
            (parameter,) = group["params"]
            group[FACTOR] = found.get(names[id(parameter)], 1.0)
        self.apply()
        return {
            "measure": self.measure,
            "bound": self.bound,
            "factors": found,
            "reason": f"(mean {self.measure} / its own)^½ of each weight, at most {self.bound:g}",
        }

    def apply(self) -> None:
        """The factors in the optimizer's groups hold for the next step."""
        groups = self.engine.optimizer.param_groups
        self.engine.lr_ratios = [float(group.get(FACTOR, 1.0)) for group in groups]
