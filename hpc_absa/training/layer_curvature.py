"""The curvature of the loss in each weight, for what is decided by layer at a decision point."""

from __future__ import annotations

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

PRODUCTS = 8
"""Hessian-vector products: of all weights together for the traces, of each for the eigenvalues."""


class LayerCurvature:
    """Measures the curvature in each weight; vectors (biases, normalizations) have none."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        sample: HessianSample,
        comm: Communicator,
        *,
        microbatch: int,
        reproducible: bool,
    ) -> None:
        """
        Args:
            model: of whose trainable parameters those with more than one dimension are measured.
            loss: as of the estimate of λ.
            sample: as of the estimate of λ; all of it is used.
            comm: communicator.
            microbatch: samples differentiated at a time.
            reproducible: sum in the fixed order of `hpc_absa.summation`.
        """
        self.model, self.comm = model, comm
        self._loss, self._sample = loss, sample
        self._settings: dict[str, Any] = {
            "samples": sample.size,
            "microbatch": microbatch,
            "reproducible": reproducible,
        }
        self._last: tuple[Any, dict[str, float]] = (None, {})

    def of(self, measure: Measure, seed: int) -> dict[str, float]:
        """By the name of each weight, the same on all ranks (a collective).

        Args:
            measure: the mean eigenvalue of the weight's diagonal block of the Hessian (`trace`, by
                Hutchinson's estimator, with `PRODUCTS` products together), or its top one.
            seed: of the random vectors; with the seed before, the values before are returned.
        """
        key, found = self._last
        if key != (measure, seed):
            weights = [name for name, p in trainable_parameters(self.model).items() if p.dim() > 1]
            with evaluation_mode(self.model):
                if measure == "trace":
                    found = self._means(weights, seed)
                else:
                    found = {name: self._top(name, seed) for name in weights}
            found = self.comm.broadcast_object(found)
            self._last = (measure, seed), found
        return found

    def _means(self, weights: list[str], seed: int) -> dict[str, float]:
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
            broadcast=self.comm.broadcast_,
        )  # fmt: skip
        return found.top.value

    def _operator(self, names: list[str]) -> HessianOperator:
        return HessianOperator(
            self.model, self._loss, self._sample, self.comm, names=names, **self._settings
        )
