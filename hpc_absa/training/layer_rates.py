"""A learning rate for each layer, from the curvature of the loss in it at the last decision point.

"Not all layers should have the same learning rate" (the ABSA talk): a flat layer can take longer
steps than a sharp one. The rate of a weight is the schedule's times a factor

    f = (c̄ / c)^½, within [1 / bound, bound]

where c is the curvature in that weight, and c̄ the geometric mean of it over all weights. Vectors
(biases, normalizations) keep the schedule's rate. The factors are in the checkpoint, as options of
the optimizer's groups.

Shapes: P parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpc_absa.comm import Communicator
from hpc_absa.curvature import eigen
from hpc_absa.curvature.operator import (
    HessianOperator,
    HessianSample,
    Loss,
    evaluation_mode,
    trainable_parameters,
)
from hpc_absa.curvature.stochastic import random_signs, random_vector

Measure = Literal["trace", "eigenvalue"]

FACTOR = "lr_factor"
"""Option of a parameter group."""

PRODUCTS = 8
"""Hessian-vector products: of all weights together for the traces, of each for the eigenvalues."""

FLOOR = 1e-6
"""Smallest curvature, relative to the largest: also of a saddle's, which is negative."""


def split_groups(optimizer: torch.optim.Optimizer) -> None:
    """Give each parameter a group of its own, with the options of its group."""
    groups = [{**g, "params": [p]} for g in optimizer.param_groups for p in g["params"]]
    optimizer.param_groups[:] = groups


def ratios(optimizer: torch.optim.Optimizer) -> list[float]:
    """Of each group: its learning rate is this times the schedule's."""
    return [float(group.get(FACTOR, 1.0)) for group in optimizer.param_groups]


def factors(curvatures: Mapping[str, float], bound: float) -> dict[str, float]:
    """f of each weight, from its curvature c; all 1 where no curvature is positive and finite."""
    largest = max(curvatures.values(), default=0.0)
    if not (largest > 0 and all(map(math.isfinite, curvatures.values()))):
        return dict.fromkeys(curvatures, 1.0)
    logs = {name: math.log(max(c, FLOOR * largest)) for name, c in curvatures.items()}
    mean = sum(logs.values()) / len(logs)
    limit = math.log(bound)
    return {name: math.exp(min(limit, max(-limit, (mean - log) / 2))) for name, log in logs.items()}


class LayerRates:
    """Measures the curvature in each weight, and sets the factors."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        sample: HessianSample,
        comm: Communicator,
        *,
        measure: Measure,
        bound: float,
        microbatch: int,
        reproducible: bool,
    ) -> None:
        """
        Args:
            model: its trainable parameters are in groups of their own.
            loss: as of the estimate of λ.
            sample: as of the estimate of λ; all of it is used.
            comm: communicator.
            measure: c is the mean eigenvalue of a weight's diagonal block of the Hessian (`trace`,
                by Hutchinson's estimator, with `PRODUCTS` products together), or its top one.
            bound: of the factors, above 1.
            microbatch: samples differentiated at a time.
            reproducible: sum in the fixed order of `hpc_absa.summation`.
        """
        self._model, self._loss, self._sample, self._comm = model, loss, sample, comm
        self.measure, self.bound = measure, bound
        self._settings: dict[str, Any] = {
            "samples": sample.size,
            "microbatch": microbatch,
            "reproducible": reproducible,
        }

    def update(self, optimizer: torch.optim.Optimizer, seed: int) -> dict[str, float]:
        """Set the factors; by the name of each weight (a collective)."""
        found = self._comm.broadcast_object(factors(self.curvatures(seed), self.bound))
        names = {id(p): name for name, p in self._model.named_parameters()}
        for group in optimizer.param_groups:
            (parameter,) = group["params"]
            group[FACTOR] = found.get(names[id(parameter)], 1.0)
        result: dict[str, float] = found
        return result

    def curvatures(self, seed: int) -> dict[str, float]:
        """c of each weight (a collective); the model is left as it was."""
        weights = [name for name, p in trainable_parameters(self._model).items() if p.dim() > 1]
        with evaluation_mode(self._model):
            if self.measure == "trace":
                return self._traces(weights, seed)
            return {name: self._top(name, seed) for name in weights}

    def _traces(self, weights: list[str], seed: int) -> dict[str, float]:
        operator = self._operator(weights)
        like = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
        sizes = [p.numel() for p in operator.parameters.values()]
        totals = torch.zeros(len(sizes), dtype=torch.float64)
        for index in range(PRODUCTS):
            signs = random_signs(like, seed + index)
            product: Tensor = signs * operator.matvec(signs)
            totals += torch.stack([part.double().sum().cpu() for part in product.split(sizes)])
        means = totals / PRODUCTS / torch.tensor(sizes)
        return dict(zip(operator.parameters, means.tolist(), strict=True))

    def _top(self, name: str, seed: int) -> float:
        operator = self._operator([name])
        like = torch.zeros(operator.size, dtype=operator.dtype, device=operator.device)
        found = eigen.lanczos(
            operator.matvec, random_vector(like, seed), tol=0.1, max_iter=PRODUCTS,
            broadcast=self._comm.broadcast_,
        )  # fmt: skip
        return found.top.value

    def _operator(self, names: list[str]) -> HessianOperator:
        return HessianOperator(
            self._model, self._loss, self._sample, self._comm, names=names, **self._settings
        )
