"""A sample of training samples by their losses, which has those with the most curvature.

Late in training a few samples have most of the curvature: those that the network has not learned.
They are rarely in a random sample. A sample with a small loss has a small curvature, for a
classifier: its cross entropy's second derivative by the outputs is at most of the order of the
loss. So samples are chosen with a probability that increases with the loss, and weighted with its
inverse. They are chosen in strata of similar losses, so that all samples of a microbatch have one
weight, as losses are means over a microbatch (Cochran, Sampling Techniques, 1977, chapter 5A).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from hpc_absa.curvature import fast
from hpc_absa.curvature.loss import sample_losses
from hpc_absa.curvature.operator import HessianOperator, HessianSample, Interrupted
from hpc_absa.curvature.sampling import Stratum

CANDIDATES = 32
"""Candidates for each sample; their forward passes take as long as ten gradients of the sample."""
STRATA = 8
SMALLEST = 16
"""Samples of a stratum, at least, so that their scatter is known."""
FLOOR = 0.25
"""A sample is chosen with a probability proportional to its loss plus this part of the mean loss.
No weight is then above five, should curvature not depend on the loss."""

POLLS = 8
"""Polls for an interruption while losses are computed; the same number on all ranks."""


class Candidates(HessianSample, Protocol):
    """Training samples, drawn at random, that a stratified sample is chosen from."""

    @property
    def population(self) -> float:
        """Number of samples that they were drawn from, without replacement."""
        ...

    def chosen(self, indices: Tensor) -> HessianSample:
        """Those at these positions [n], int64, in this order."""
        ...


def candidate_losses(operator: HessianOperator) -> Tensor | None:
    """The loss of each sample of `operator`, [N] float64 (a collective).

    None, on all ranks, if that of a single sample is not known, or one is not finite.

    Raises:
        Interrupted: `poll` returned True.
    """
    sums = torch.zeros(2, operator.samples, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in operator.parameters.items()}
    own = operator.own_microbatches
    for first in range(POLLS):
        if operator.poll is not None and operator.poll():
            raise Interrupted
        for index in own[first::POLLS]:
            start, stop = operator.bounds[index]
            try:
                with torch.no_grad():
                    inputs, targets = operator.load(index)
                    outputs = fast.forward(operator.model, inputs, parameters, fast.PLAIN)
                    losses = sample_losses(operator.loss_fn, outputs, targets, stop - start)
                sums[0, start:stop] = losses
            except Exception:  # a random sample is used instead, and shows what is wrong
                sums[1, start:stop] = 1
    losses, failed = operator.comm.allreduce_(sums)
    return None if failed.any() or not torch.isfinite(losses).all() else losses


def stratify(losses: Tensor, samples: int) -> tuple[Tensor, list[Stratum]]:
    """Choose about `samples` of the candidates, which have these losses [M].

    The first stratum has those whose probability is 1. The others have the same sum of
    probabilities each, and so about as many samples, at equal distances in the order of losses.

    Returns:
        The positions of the chosen, [n] int64, largest losses first, and the strata.
    """
    excess = losses - losses.min()
    size = excess + FLOOR * excess.mean()
    if not float(size.sum()) > 0:
        size = torch.ones_like(losses)
    order = torch.argsort(losses, descending=True, stable=True)
    probabilities = _probabilities(size[order], samples)
    certain = int((probabilities == 1).sum())
    left = samples - certain
    count = max(1, min(STRATA, left // SMALLEST))
    limits = [left * number // count for number in range(count + 1)]
    reached = torch.cumsum(probabilities[certain:], 0)
    inner = [certain + int((reached <= limit + 1e-6).sum()) for limit in limits[1:-1]]
    edges = [0, certain, *inner, len(losses)]
    wanted = [certain, *(high - low for low, high in pairwise(limits))]
    chosen, strata, start = [], [], 0
    for (first, last), number in zip(pairwise(edges), wanted, strict=True):
        members, number = order[first:last], min(number, last - first)
        if number:
            places = (torch.arange(number, dtype=torch.float64) + 0.5) * len(members) / number
            chosen.append(members[places.long()])
            strata.append(Stratum(start, start + number, len(members)))
        start += number
    return torch.cat(chosen), strata


def _probabilities(size: Tensor, samples: int) -> Tensor:
    """Proportional to `size` [M], at most 1, with the sum `samples`."""
    certain = torch.zeros(len(size), dtype=torch.bool)
    while not certain.all():
        rest, left = torch.where(certain, 0.0, size), samples - int(certain.sum())
        probabilities = torch.where(certain, 1.0, rest * left / rest.sum())
        if not (probabilities[~certain] >= 1).any():
            return probabilities
        certain |= probabilities >= 1
    return torch.ones_like(size)
