"""What is measured on the test set beside the loss, by name or as a user's function.

A metric adds sums over batches, and its value is computed from the sums over the whole test set: it
does not depend on how the batches are distributed over ranks.

Shapes: b samples, C classes or labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_absa import plugins
from hpc_absa.errors import UsageError
from hpc_absa.models.losses import IGNORED, Loss, flat_classes, require_tensors, shaped_like


class Metric(Protocol):
    """One number of the test set."""

    name: str
    required: bool
    """Whether outputs that it cannot be measured on are an error."""

    def sums(self, outputs: Any, targets: Any) -> Sequence[float]:
        """Of one batch; always as many numbers."""
        ...

    def value(self, sums: Sequence[float]) -> float | None:
        """From the sums over all batches; None if nothing was measured."""
        ...


class Ratio:
    """Base of metrics that are a mean."""

    name: str
    required = True

    def value(self, sums: Sequence[float]) -> float | None:
        total, count = sums
        return total / count if count else None


class Accuracy(Ratio):
    """Fraction of samples, tokens or labels that are predicted right.

    The largest score predicts; one output for each sample of two classes predicts the second one
    above a threshold, as does each of several labels.
    """

    name = "accuracy"

    def __init__(self, loss: Loss, ignore_index: int = IGNORED, optional_for: int = 0) -> None:
        """
        Args:
            loss: determines the threshold.
            ignore_index: class that does not count.
            optional_for: a number of classes: nothing is measured if the outputs are no scores of
                them; 0: that is an error.
        """
        self._loss, self._ignore_index, self._classes = loss, ignore_index, optional_for
        self.required = not optional_for
        self._threshold: float | None = None

    def sums(self, outputs: Any, targets: Any) -> Sequence[float]:
        if self._classes and not is_scores(outputs, targets, self._classes):
            return 0.0, 0.0
        require_tensors(self.name, outputs, targets)
        if is_labels(outputs, targets):
            if self._threshold is None:
                self._threshold = threshold_of(self._loss, outputs, targets)
            predicted = outputs.reshape(targets.shape) > self._threshold
            return float((predicted == (targets > 0)).sum()), float(targets.numel())
        scores, classes = kept_classes(outputs, targets, self._ignore_index)
        return float((scores.argmax(1) == classes).sum()), float(len(classes))


class TopK(Ratio):
    """Fraction of samples or tokens whose class is among the k of the largest scores."""

    def __init__(self, k: int, ignore_index: int = IGNORED) -> None:
        self.name, self._k, self._ignore_index = f"top{k}", k, ignore_index

    def sums(self, outputs: Any, targets: Any) -> Sequence[float]:
        require_tensors(self.name, outputs, targets)
        scores, classes = kept_classes(outputs, targets, self._ignore_index)
        best = scores.topk(min(self._k, scores.shape[1]), dim=1).indices
        return float((best == classes[:, None]).sum()), float(len(classes))


class Error(Ratio):
    """The mean of a power of the differences."""

    def __init__(self, name: str, power: int) -> None:
        self.name, self._power = name, power

    def sums(self, outputs: Any, targets: Any) -> Sequence[float]:
        targets = shaped_like(outputs, targets, self.name)
        each = (outputs.double() - targets.double()).abs() ** self._power
        return float(each.sum()), float(targets.numel())


class Perplexity(Ratio):
    """`exp` of the mean cross entropy over tokens, without label smoothing."""

    name = "perplexity"

    def __init__(self, ignore_index: int = IGNORED) -> None:
        self._ignore_index = ignore_index

    def sums(self, outputs: Any, targets: Any) -> Sequence[float]:
        require_tensors(self.name, outputs, targets)
        scores, classes = kept_classes(outputs, targets, self._ignore_index)
        total = F.cross_entropy(scores.float(), classes, reduction="sum")
        return float(total), float(len(classes))

    def value(self, sums: Sequence[float]) -> float | None:
        mean = super().value(sums)
        if mean is None or math.isnan(mean):
            return mean
        return math.exp(mean) if mean < 700 else math.inf


class F1:
    """The mean over classes or labels of 2·TP / (2·TP + FP + FN); of two classes that of the second
    one, if there is one output for each sample. A class that neither occurs nor is predicted is
    left out.
    """

    name, required = "f1", True

    def __init__(self, loss: Loss, ignore_index: int = IGNORED) -> None:
        self._loss, self._ignore_index = loss, ignore_index
        self._threshold: float | None = None

    def sums(self, outputs: Any, targets: Any) -> Sequence[float]:
        require_tensors(self.name, outputs, targets)
        if is_labels(outputs, targets):
            if self._threshold is None:
                self._threshold = threshold_of(self._loss, outputs, targets)
            flat = (len(targets), -1) if targets.dim() > 1 else (-1, 1)
            true = (targets > 0).reshape(flat)
            predicted = (outputs > self._threshold).reshape(flat)
        else:
            scores, classes = kept_classes(outputs, targets, self._ignore_index)
            count = scores.shape[1]
            true, predicted = (F.one_hot(c, count).bool() for c in (classes, scores.argmax(1)))
        counts = [true & predicted, predicted & ~true, true & ~predicted]
        return [float(number) for each in counts for number in each.sum(0)]

    def value(self, sums: Sequence[float]) -> float | None:
        size = len(sums) // 3
        each = [
            2 * tp / (2 * tp + fp + fn)
            for tp, fp, fn in zip(sums[:size], sums[size : 2 * size], sums[2 * size :], strict=True)
            if tp + fp + fn
        ]
        return math.fsum(each) / len(each) if each else None


class UserDefined(Ratio):
    """A function of (outputs, targets): the mean over a batch, or `(sum, denominator)`."""

    def __init__(self, reference: str) -> None:
        self.name = reference.rpartition(":")[2].rpartition(".")[2]
        self._reference = reference
        self._function = plugins.resolve(reference, "train.metrics")

    def sums(self, outputs: Any, targets: Any) -> Sequence[float]:
        result = self._function(outputs, targets)
        try:
            if isinstance(result, tuple):
                total, denominator = result
                return float(total), float(denominator)
            samples = float(len(next(t for t in (targets, outputs) if isinstance(t, Tensor))))
            return float(result) * samples, samples
        except (TypeError, ValueError, RuntimeError, StopIteration) as error:
            raise UsageError(
                f"train.metrics: {self._reference} returned a {type(result).__name__}, expected a "
                "number, the mean over the batch, or (sum, denominator)"
            ) from error


def build(name: str, loss: Loss, ignore_index: int = IGNORED) -> Metric:
    """The metric that an element of `train.metrics` names, which the job file has checked.

    Raises:
        UsageError: a user's function cannot be loaded.
    """
    if plugins.is_reference(name):
        return UserDefined(name)
    match name:
        case "accuracy":
            return Accuracy(loss, ignore_index)
        case "f1":
            return F1(loss, ignore_index)
        case "perplexity":
            return Perplexity(ignore_index)
        case "mse" | "mae":
            return Error(name, 2 if name == "mse" else 1)
    return TopK(int(name.removeprefix("top")), ignore_index)


def default(
    loss_name: str, loss: Loss, ignore_index: int, *, classes: int, sequences: bool
) -> tuple[Metric, ...]:
    """What is measured where the job does not say it; the first is the one that is shown.

    Args:
        loss_name: `train.loss`.
        loss: that loss.
        ignore_index: class that does not count.
        classes: of a packed data set, whose targets are classes; 0 for other data.
        sequences: whether a sample has more than one target.
    """
    match loss_name:
        case "mse" | "huber":
            return (Error("mse", 2),)
        case "l1":
            return (Error("mae", 1),)
        case "bce_with_logits" if sequences:
            return F1(loss), Accuracy(loss)
        case "cross_entropy" if sequences:
            return Perplexity(ignore_index), Accuracy(loss, ignore_index)
        case "cross_entropy" | "bce_with_logits":
            return (Accuracy(loss, ignore_index),)
    return (Accuracy(loss, optional_for=classes),) if classes else ()


def shown(metrics: Mapping[str, float], loss: float | None) -> str:
    """The most important result as text: the first metric, or else the loss."""
    for name, value in metrics.items():
        percent = name in ("accuracy", "f1") or (name[:3] == "top" and name[3:].isdigit())
        return f"{name} {value:.2%}" if percent else f"{name} {value:.4g}"
    return "" if loss is None else f"loss {loss:.4g}"


# Outputs


def is_scores(outputs: Any, targets: Any, classes: int) -> bool:
    """Whether outputs are a score for each class, or one for each sample of two classes."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        return False
    if classes == 2 and is_labels(outputs, targets):
        return True
    return outputs.dim() == 2 and len(outputs) == len(targets) and outputs.shape[1] >= classes


def is_labels(outputs: Tensor, targets: Tensor) -> bool:
    """Whether there is one output for each target, of 0 or 1."""
    return [n for n in outputs.shape if n != 1] == [n for n in targets.shape if n != 1]


def kept_classes(outputs: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Scores [n, C] and classes [n] of what is not ignored."""
    scores, classes = flat_classes(outputs, targets)
    kept = classes != ignore_index
    return (scores, classes) if bool(kept.all()) else (scores[kept], classes[kept])


def threshold_of(loss: Loss, outputs: Tensor, targets: Tensor) -> float:
    """From which on one output predicts the second class.

    That is 0.5 where the loss is the same for both classes there and not at 0, as for
    probabilities; otherwise 0, as for logits.
    """

    def value(output: float, target: int) -> float:
        result = loss(torch.full_like(outputs[:1], output), torch.full_like(targets[:1], target))
        return float(result[0] if isinstance(result, tuple) else result)

    try:
        at_half = math.isclose(value(0.5, 0), value(0.5, 1), rel_tol=1e-5)
        return 0.5 if at_half and not math.isclose(value(0, 0), value(0, 1), rel_tol=1e-5) else 0.0
    except Exception:
        return 0.0  # a loss that cannot be called with one sample
