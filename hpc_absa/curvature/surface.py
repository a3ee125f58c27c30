"""The loss along directions of the parameter space: sharp and flat minima, seen.

Shapes: P trainable parameters, n points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from hpc_absa.curvature.operator import HessianOperator

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Slice:
    """`L(w + t v)` for a unit vector v."""

    distances: Floats
    """[n], t, in units of the weights."""
    losses: Floats
    """[n], the mean loss over the sample."""
    eigenvalue: float
    """Along v: the parabola to compare with is `L(w) + t ∇L·v + λ t² / 2`."""


def slices(
    operator: HessianOperator,
    vectors: NDArray[np.float32],
    values: Floats,
    points: int,
    rise: float = 1.0,
) -> tuple[Slice, ...]:
    """The loss along each row of `vectors` [k, P].

    Distances reach to where a parabola of the direction's curvature has risen by `rise` (in units
    of the loss), so that sharp and flat directions fill the same picture.
    """
    if points < 2 or not np.isfinite(values).all():
        return ()
    found = []
    for vector, value in zip(vectors, values, strict=True):
        reach = (2 * rise / max(abs(float(value)), 1e-12)) ** 0.5
        reach = min(reach, 1e3)
        distances = np.linspace(-reach, reach, points)
        direction = torch.from_numpy(vector)
        losses = [operator.loss(direction * float(distance)) for distance in distances]
        found.append(Slice(distances, np.array(losses), float(value)))
    return tuple(found)
