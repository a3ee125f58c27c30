"""What is computed once, so that one sample can be asked many questions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor

from hpc_absa.curvature import estimate
from hpc_absa.curvature.directional import sample_curvatures
from hpc_absa.curvature.operator import HessianOperator
from hpc_absa.curvature.stratified import candidate_losses


@contextmanager
def memoized_products() -> Iterator[None]:
    """Products, curvatures of single samples, losses of candidates; nothing may change within."""
    known: dict[Any, Any] = {}
    multiply, differentiate = HessianOperator.matvec, HessianOperator.gradient

    def key(self: HessianOperator, vector: Tensor | None) -> Any:
        bits = None if vector is None else hash(vector.cpu().numpy().tobytes())
        first, factors = getattr(self.sample, "first", 0), tuple(self.factors)
        return first, self.samples, self.microbatch, factors, bits

    def gradient(self: HessianOperator) -> Tensor:
        own = key(self, None)
        if own not in known:
            known[own] = differentiate(self)
        return known[own].clone()

    def matvec(
        self: HessianOperator, vector: Tensor, record: Callable[[int, Tensor], None] | None = None
    ) -> Tensor:
        own = key(self, vector)
        if own not in known:
            terms: list[tuple[int, Tensor]] = []
            image = multiply(self, vector, lambda index, term: terms.append((index, term)))
            known[own] = image, terms, list(self.denominators)
        else:
            self.matvecs += 1
        image, terms, self.denominators = known[own]
        for index, term in terms:
            if record is not None:
                record(index, term)
        return image.clone()

    def losses(operator: HessianOperator) -> Tensor | None:
        if operator.samples not in known:
            known[operator.samples] = candidate_losses(operator)
        return known[operator.samples]

    def curvatures(
        operator: HessianOperator, vector: Tensor, expected: float | None = None
    ) -> Tensor | None:
        own = key(operator, vector), expected
        if own not in known:
            known[own] = sample_curvatures(operator, vector, expected)
        return known[own]

    with (
        mock.patch.object(estimate, "candidate_losses", losses),
        mock.patch.object(estimate, "sample_curvatures", curvatures),
        mock.patch.object(HessianOperator, "matvec", matvec),
        mock.patch.object(HessianOperator, "gradient", gradient),
    ):
        yield
