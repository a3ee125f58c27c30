"""An orthonormal basis with its image under a symmetric operator, and the arithmetic for it.

Shapes: P the operator's size, m the number of basis vectors. Vectors are of the operator's type,
every coefficient is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Agree = Callable[[Tensor], Tensor]
"""Replaces a small float64 tensor by rank 0's, so that all ranks go the same way."""

_CHUNK = 1 << 20
"""Elements turned into float64 at a time: bounds the memory a dot product takes."""


def dots(vectors: Tensor, vector: Tensor) -> Tensor:
    """`Vᵀ w` in float64: [m, P] and [P] to [m], on the CPU."""
    total = torch.zeros(len(vectors), dtype=torch.float64, device=vector.device)
    for start in range(0, vector.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        total += vectors[:, part].double() @ vector[part].double()
    return total.cpu()


def combine(vectors: Tensor, weights: Tensor) -> Tensor:
    """`Σ_i c_i v_i`: [m, P] and [m] float64 to [P]."""
    return torch.mv(vectors.T, weights.to(vectors.dtype).to(vectors.device))


def negligible(like: Tensor) -> float:
    """Relative to the operator's norm: below it a product cannot be told from zero (64 ulp)."""
    return 64 * torch.finfo(like.dtype).eps


def norm(vector: Tensor) -> Tensor:
    """`‖v‖` as a float64 scalar tensor on the CPU."""
    return dots(vector[None], vector).sqrt()[0]


class Subspace:
    """An orthonormal basis V, its image W = HV and the projection T = VᵀHV."""

    def __init__(self, like: Tensor, capacity: int, agree: Agree) -> None:
        self.V = like.new_empty(capacity, like.numel())
        self.W = like.new_empty(capacity, like.numel())
        self.T = np.zeros((0, 0))
        self.agree = agree

    def __len__(self) -> int:
        return len(self.T)

    @property
    def full(self) -> bool:
        """No room for another vector."""
        return len(self) == len(self.V)

    def orthogonal(self, vector: Tensor) -> Tensor | None:
        """The unit vector along what `vector` adds to the basis; None where it adds nothing."""
        before = float(self.agree(norm(vector)))
        if not (math.isfinite(before) and before > 0):
            return None
        vector = vector / before
        for _ in range(3):  # "twice is enough" (Parlett 6.9), once more for float32
            basis = self.V[: len(self)]
            vector = vector - combine(basis, self.agree(dots(basis, vector)))
            length = float(self.agree(norm(vector)))
            if length < negligible(vector):
                return None
            vector = vector / length
        return vector

    def project_out(self, vector: Tensor) -> Tensor:
        """`(I − VVᵀ) v`, not normalized."""
        basis = self.V[: len(self)]
        for _ in range(2):
            vector = vector - combine(basis, self.agree(dots(basis, vector)))
        return vector

    def add(self, vector: Tensor, image: Tensor) -> bool:
        """Take in a unit vector and its product; False, with nothing taken, unless finite."""
        m = len(self)
        self.V[m], self.W[m] = vector, image
        column = self.agree(dots(self.V[: m + 1], image)).numpy()
        if not np.isfinite(column).all():
            return False
        projected = np.zeros((m + 1, m + 1))
        projected[:m, :m] = self.T
        projected[m, :] = projected[:, m] = column
        self.T = projected
        return True

    def ritz(self) -> tuple[np.ndarray, np.ndarray]:
        """Ritz values, largest first [m], and their coordinates, one a column [m, m]."""
        values, coordinates = np.linalg.eigh(self.T)
        return values[::-1], coordinates[:, ::-1]

    def residual(self, value: float, coordinates: np.ndarray) -> Tensor:
        """`H y − θ y` of a Ritz pair, [P]."""
        weights = torch.from_numpy(np.ascontiguousarray(coordinates))
        m = len(self)
        return combine(self.W[:m], weights) - value * combine(self.V[:m], weights)

    def restart(self, keep: int) -> None:
        """Compress to the `keep` leading Ritz vectors (thick restart, Wu and Simon 2000)."""
        values, coordinates = self.ritz()
        weights = torch.from_numpy(np.ascontiguousarray(coordinates[:, :keep].T))
        m = len(self)
        for block in (self.V, self.W):
            block[:keep] = torch.stack([combine(block[:m], row) for row in weights])
        self.T = np.diag(values[:keep].copy())
