"""The accuracy of a model under several attacks, measured on all ranks together."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpc_absa.adversarial import attacks, fgsm
from hpc_absa.adversarial.attacks import Attacked, Loss, Norm
from hpc_absa.comm import Communicator, raise_on_all_ranks
from hpc_absa.errors import UsageError
from hpc_absa.plugins import suggestion

BATCH = 100
"""Samples attacked at a time, whatever the number of ranks."""

EXAMPLES = 6
"""Fooled samples that are kept for a figure."""

QUANTILES = (0.1, 0.5, 0.9)

TRUST_REGION = tuple(
    f"tr-{norm}-{target}{radius}"
    for norm in ("l2", "linf")
    for target in ("easy", "hard")
    for radius in ("", "-fixed")
)
NAMES = ("fgsm", "pgd", "pgd-l2", *TRUST_REGION)
DEFAULT = ("fgsm", "pgd", *(name for name in TRUST_REGION if not name.endswith("fixed")))


@dataclass(frozen=True)
class Options:
    """Which attacks, on how many samples, with which parameters."""

    attacks: tuple[str, ...] = DEFAULT
    """Of `NAMES`."""
    samples: int = 200
    """Test samples, at equal distances in the test set."""
    epsilons: tuple[float, ...] = (2.0, 8.0)
    """ε of FGSM and PGD, in 255ths of the range of a pixel; in the data's units, if no image."""
    steps: int = 10
    """Of PGD, each of ε / 4."""
    radius: float = 1e-3
    """First trust radius, in the units of the model's inputs."""
    iterations: int = 400
    """Of the trust-region attack, at most."""
    reference: bool = False
    """Adapt the trust radius by the rule of the authors' code."""

    def check(self) -> None:
        """Refuse unknown names and values out of range.

        Raises:
            UsageError: one line.
        """
        for name in self.attacks:
            if name not in NAMES:
                raise UsageError(
                    f"attack {name!r}: expected some of {', '.join(NAMES)}"
                    + suggestion(name, NAMES)
                )
        sizes = [*(("epsilon", value) for value in self.epsilons), ("radius", self.radius)]
        for title, value in sizes:
            if not 0 < value < math.inf:
                raise UsageError(f"{title} = {value:g}: expected a positive number")


@dataclass(frozen=True)
class InputSpace:
    """What the inputs of a model can be, and ε in their units."""

    valid: tuple[Tensor, Tensor]
    """Smallest and largest value, broadcastable to inputs."""
    unit: Tensor
    """One unit of ε, broadcastable to inputs."""


@dataclass(frozen=True)
class Attack:
    """An attack with all its parameters."""

    name: str
    norm: Norm
    """Of the perturbation that is reported."""
    run: Callable[[Tensor, Tensor], Attacked]
    """From inputs and targets of a batch."""


@dataclass(frozen=True)
class Result:
    """One attack on all samples; the same on all ranks."""

    attack: str
    norm: Norm
    accuracy: float
    """After the attack; a sample that was classified wrongly before counts as wrong."""
    fooled: float
    """Share of the samples that were classified correctly before."""
    mean: float
    """Of `‖δ‖ / ‖x‖` over all samples, as published; it is 0 for those not attacked."""
    largest: float
    quantiles: tuple[float, ...]
    """`QUANTILES` of it over the fooled samples; NaN if there are none."""
    updates: int
    """Changes of a sample, summed over all samples."""
    seconds_per_sample: float
    """Of one rank."""
    perturbations: NDArray[np.float64]
    """[samples], `‖δ‖ / ‖x‖`."""
    robust: NDArray[np.bool_]
    """[samples], classified correctly after the attack."""


@dataclass(frozen=True)
class Robustness:
    """All attacks on one model."""

    origin: str
    """The file of its weights."""
    samples: int
    accuracy: float
    """Without an attack."""
    results: tuple[Result, ...]


@dataclass(frozen=True)
class Examples:
    """Samples before and after one attack, as the model takes them."""

    attack: str
    before: NDArray[np.float32]
    """[k, ...]."""
    after: NDArray[np.float32]
    targets: NDArray[np.int64]
    """[k]."""
    predicted: NDArray[np.int64]
    """[k], after the attack."""


def build(options: Options, model: nn.Module, loss: Loss, space: InputSpace) -> list[Attack]:
    """The attacks that `options` names, in its order; FGSM and PGD once for each ε."""
    made: list[Attack] = []
    for name in options.attacks:
        if name.startswith("tr-"):
            norm: Norm = "linf" if "linf" in name else "l2"
            run = partial(
                attacks.trust_region, model, valid=space.valid, norm=norm, hard="hard" in name,
                adaptive=not name.endswith("fixed"), radius=options.radius,
                steps=options.iterations, reference=options.reference,
            )  # fmt: skip
            made.append(Attack(name, norm, run))
            continue
        for epsilon in options.epsilons:
            limits: dict[str, Any] = {"epsilon": space.unit * epsilon, "valid": space.valid}
            norm = "l2" if name.endswith("l2") else "linf"
            if name == "fgsm":
                run = partial(_fgsm, model, loss, **limits)
            else:
                run = partial(attacks.pgd, model, loss, **limits, norm=norm, steps=options.steps)
            made.append(Attack(f"{name} ε={epsilon:g}", norm, run))
    return made


def _fgsm(
    model: nn.Module,
    loss: Loss,
    inputs: Tensor,
    targets: Tensor,
    epsilon: Tensor,
    valid: tuple[Tensor, Tensor],
) -> Attacked:
    """FGSM on the samples that are classified correctly."""
    with fgsm.frozen(model):
        right = attacks.correct(model, inputs, targets)
    moved = fgsm.perturb(model, loss, inputs, targets, epsilon, valid)
    keep = right.view(-1, *(1,) * (inputs.dim() - 1))
    return Attacked(torch.where(keep, moved, inputs), right.long().cpu())


Batch = tuple[NDArray[np.int64], Tensor, Tensor]
"""Numbers of the samples [n], inputs and targets."""


def measure(
    model: nn.Module,
    batches: Sequence[Callable[[], Batch]],
    made: Iterable[Attack],
    comm: Communicator,
    origin: str,
    progress: Callable[[str], None] = lambda name: None,
) -> tuple[Robustness, list[Examples]]:
    """Run every attack on every batch (a collective); a rank takes every `size`-th batch.

    Args:
        model: on the device of the batches.
        batches: the same on all ranks; called for this rank's only.
        made: the attacks.
        comm: communicator.
        origin: of the weights.
        progress: called with the name of each attack.

    Returns:
        The result, the same on all ranks, and rank 0's examples.
    """
    mine = [batch() for batch in batches[comm.rank :: comm.size]]

    def classify() -> list[NDArray[np.bool_]]:
        for _, inputs, _ in mine[:1]:
            attacks.require_attackable(inputs)
        with fgsm.frozen(model):
            return [attacks.correct(model, x, y).cpu().numpy() for _, x, y in mine]

    right = raise_on_all_ranks(comm, classify)
    before = _gather([number for number, _, _ in mine], right, comm)
    results, examples = [], []
    for attack in made:
        progress(attack.name)
        result, example = _measure(model, attack, mine, before, comm)
        results.append(result)
        examples += [example] if example else []
    accuracy = float(before.mean()) if len(before) else math.nan
    return Robustness(origin, len(before), accuracy, tuple(results)), examples


def _measure(
    model: nn.Module,
    attack: Attack,
    mine: Sequence[Batch],
    before: NDArray[Any],
    comm: Communicator,
) -> tuple[Result, Examples | None]:
    start = time.perf_counter()
    attacked = [attack.run(inputs, targets) for _, inputs, targets in mine]
    seconds = time.perf_counter() - start
    numbers = [number for number, _, _ in mine]
    sizes, rights, updates, example = [], [], 0, None
    for (_, inputs, targets), moved in zip(mine, attacked, strict=True):
        with fgsm.frozen(model), torch.no_grad():
            predicted = model(moved.inputs.clone()).argmax(1)
        right = predicted == targets
        rights.append(right.cpu().numpy())
        sizes.append(attacks.relative_size(moved.inputs, inputs, attack.norm).double().cpu())
        updates += int(moved.updates.sum())
        if example is None:
            example = _example(attack, inputs, moved.inputs, targets, predicted)
    perturbations = _gather(numbers, [size.numpy() for size in sizes], comm)
    robust = _gather(numbers, rights, comm)
    totals = comm.allgather_object((seconds, updates, sum(map(len, numbers))))
    samples = max(1, sum(count for _, _, count in totals))
    fooled = before & ~robust
    of_fooled = perturbations[fooled]
    result = Result(
        attack.name,
        attack.norm,
        accuracy=float(robust.mean()) if len(robust) else math.nan,
        fooled=float(fooled.sum() / max(1, before.sum())),
        mean=float(perturbations.mean()) if len(robust) else math.nan,
        largest=float(perturbations.max(initial=0.0)),
        quantiles=tuple(
            float(np.quantile(of_fooled, q)) if len(of_fooled) else math.nan for q in QUANTILES
        ),
        updates=sum(count for _, count, _ in totals),
        seconds_per_sample=sum(taken for taken, _, _ in totals) / samples,
        perturbations=perturbations,
        robust=robust,
    )
    return result, example


def _gather(
    numbers: Sequence[NDArray[np.int64]], values: Sequence[NDArray[Any]], comm: Communicator
) -> NDArray[Any]:
    """Values of all ranks' samples, by the number of the sample."""
    pairs = [(n, v) for part in comm.allgather_object(list(zip(numbers, values, strict=True)))
             for n, v in part]  # fmt: skip
    if not pairs:
        return np.zeros(0)
    order = np.argsort(np.concatenate([n for n, _ in pairs]), kind="stable")
    return np.concatenate([v for _, v in pairs])[order]


def _example(
    attack: Attack, inputs: Tensor, moved: Tensor, targets: Tensor, predicted: Tensor
) -> Examples | None:
    changed = (moved - inputs).flatten(1).abs().amax(1) > 0
    fooled = (changed & (predicted != targets)).nonzero().view(-1)
    if not len(fooled):
        return None
    chosen = fooled[:: -(-len(fooled) // EXAMPLES)]  # from all of the batch
    parts = (inputs[chosen], moved[chosen], targets[chosen], predicted[chosen])
    return Examples(attack.name, *(part.cpu().numpy() for part in parts))
