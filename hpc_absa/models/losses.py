"""Losses by name, of outputs and targets of b samples.

A loss returns the mean over the samples, or `(sum, denominator)` where samples count differently:
tokens that are not ignored, weighted classes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hpc_absa import plugins
from hpc_absa.errors import UsageError

Loss = Callable[[Any, Any], Any]

IGNORED = -100
"""Target of the tokens or pixels that do not count, as in PyTorch."""


def build_loss(name: str, arguments: Mapping[str, Any] | None = None) -> Loss:
    """The loss that `train.loss` names.

    Args:
        name: one of `LOSSES`, or `"package.module:name"`: a function called with outputs, targets
            and `arguments`, or a class such as `"torch.nn:MultiMarginLoss"`, created with
            `arguments` once.
        arguments: the job's `[loss]` table.

    Raises:
        UsageError: unknown name, or arguments that the loss does not have.
    """
    given = dict(arguments or {})
    if plugins.is_reference(name):
        target = plugins.resolve(name, "train.loss")
        if inspect.isclass(target):
            return plugins.call(target, "loss", given, {})
        try:
            inspect.signature(target).bind(None, None, **given)
        except ValueError:  # some functions written in C have no signature
            pass
        except TypeError as error:
            raise UsageError(
                f"loss: {getattr(target, '__name__', target)} cannot be called with outputs, "
                f"targets and {list(given) or 'no arguments'}: {error}"
            ) from error
        return partial(target, **given)
    if name not in LOSSES:
        raise UsageError(
            f'train.loss: no loss "{name}"{plugins.suggestion(name, LOSSES)} Known are '
            f'{", ".join(LOSSES)} and your own as "package.module:function"'
        )
    function = LOSSES[name]
    valid = inspect.signature(function).parameters.keys() - {"outputs", "targets"}
    for key, value in given.items():
        if key not in valid:
            raise UsageError(
                f"loss.{key}: {name} has no such argument; {plugins.valid_ones(valid)}"
            )
        given[key] = _checked(key, value)
    return partial(function, **given)


def _checked(key: str, value: Any) -> Any:
    """A number, or a list of numbers as a tensor."""
    if key in ("weight", "pos_weight"):
        try:
            weights = torch.tensor(value, dtype=torch.float32)
        except (TypeError, ValueError):
            weights = torch.tensor(-1.0)
        if not weights.isfinite().all() or (weights < 0).any() or weights.dim() > 1:
            raise UsageError(f"loss.{key} = {value!r}: expected a list of numbers of 0 or more")
        return weights
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"loss.{key} = {value!r}: expected a number")
    if key == "label_smoothing" and not 0 <= value < 1:
        raise UsageError(f"loss.label_smoothing: {value}, expected from 0 to below 1")
    if key == "ignore_index" and not isinstance(value, int):
        raise UsageError(f"loss.ignore_index = {value!r}: expected an integer")
    if key == "delta" and value <= 0:
        raise UsageError(f"loss.delta = {value!r}: expected a number above 0")
    return value


def cross_entropy(
    outputs: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
    weight: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Of classes or of the classes of a sequence or image; `targets` may also be probabilities.

    Args:
        outputs: scores [b, C]; [b, T, C] or [b, C, ...] for sequences and images.
        targets: classes [b], [b, T], [b, ...], or probabilities shaped like `outputs`, which then
            have not three axes.
        label_smoothing: share of a target that is spread over all classes.
        ignore_index: target that does not count. For sequences and images the default is -100.
        weight: [C], of each class.

    Returns:
        The mean over samples; or the sum over what counts, with its number or weight.
    """
    require_tensors("cross_entropy", outputs, targets)
    weight = None if weight is None else weight.to(outputs.device, outputs.dtype)
    if targets.is_floating_point():
        if targets.shape != outputs.shape:
            raise UsageError(
                f"cross_entropy: targets are {targets.dtype} {list(targets.shape)}, expected "
                f"classes (integers), or probabilities {list(outputs.shape)}; for numbers choose "
                "the loss mse, l1 or huber"
            )
        if outputs.dim() == 3:
            raise UsageError(
                f"cross_entropy: probabilities {list(targets.shape)}, expected [b, C]: of three "
                "axes it is not known which one has the classes; give your own loss"
            )
        return F.cross_entropy(outputs, targets, weight, label_smoothing=label_smoothing)
    if targets.dim() == 1 and ignore_index is None and weight is None:
        # no class is ignored: a target of -100 is an error
        return F.cross_entropy(
            outputs, targets, ignore_index=-(2**31), label_smoothing=label_smoothing
        )
    scores, classes = flat_classes(outputs, targets)
    ignored = IGNORED if ignore_index is None else ignore_index
    total = F.cross_entropy(
        scores,
        classes,
        weight,
        ignore_index=ignored,
        label_smoothing=label_smoothing,
        reduction="sum",
    )
    kept = classes != ignored
    if weight is None:
        return total, kept.sum()
    return total, (weight[classes.where(kept, 0)] * kept).sum()


def bce_with_logits(outputs: Tensor, targets: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Of independent labels: logits [b, L], targets 0 and 1 [b, L]; or of two classes, [b]."""
    targets = shaped_like(outputs, targets, "bce_with_logits")
    weight = None if pos_weight is None else pos_weight.to(outputs.device, outputs.dtype)
    return F.binary_cross_entropy_with_logits(outputs, targets, pos_weight=weight)


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean of squared differences; `targets` shaped like `outputs`, but for axes of 1."""
    return F.mse_loss(outputs, shaped_like(outputs, targets, "mse"))


def l1(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean of absolute differences."""
    return F.l1_loss(outputs, shaped_like(outputs, targets, "l1"))


def huber(outputs: Tensor, targets: Tensor, delta: float = 1.0) -> Tensor:
    """The mean of differences, squared up to `delta` and linear above."""
    return F.huber_loss(outputs, shaped_like(outputs, targets, "huber"), delta=delta)


LOSSES: Mapping[str, Callable[..., Any]] = {
    "cross_entropy": cross_entropy,
    "bce_with_logits": bce_with_logits,
    "mse": mse,
    "l1": l1,
    "huber": huber,
}


def require_tensors(name: str, outputs: Any, targets: Any) -> None:
    """
    Raises:
        UsageError: the model returned, or the data set has, something that only a user's own
            function can take.
    """
    for kind, value in (("outputs", outputs), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise UsageError(
                f"{name}: the {kind} are {_kind(value)}, expected a tensor; give your own as "
                '"package.module:function" of (outputs, targets)'
            )


def shaped_like(outputs: Tensor, targets: Tensor, name: str) -> Tensor:
    """`targets` with the shape and type of `outputs`; only axes of length 1 may differ."""
    require_tensors(name, outputs, targets)
    if [n for n in outputs.shape if n != 1] != [n for n in targets.shape if n != 1]:
        raise UsageError(
            f"{name}: outputs {list(outputs.shape)} and targets {list(targets.shape)}, expected "
            "equal shapes"
        )
    return targets.to(outputs.dtype).reshape(outputs.shape)


def flat_classes(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Scores [n, C] and classes [n], of all tokens or pixels.

    The axis of classes is the last one, as in language models, or the second one, as in PyTorch's
    losses. Where both fit it is the last one of three axes, and the second one of more.
    """
    last = outputs.shape[:-1] == targets.shape
    second = outputs.dim() > 1 and (outputs.shape[:1] + outputs.shape[2:]) == targets.shape
    if not (last or second):
        raise UsageError(
            f"cross_entropy: outputs {list(outputs.shape)} and targets {list(targets.shape)}, "
            "expected scores [b, T, C] and classes [b, T], or [b, C, ...] and [b, ...]"
        )
    if second and not (last and outputs.dim() <= 3):
        outputs = outputs.movedim(1, -1)
    return outputs.reshape(-1, outputs.shape[-1]), targets.reshape(-1)


def _kind(value: Any) -> str:
    return "absent" if value is None else f"a {type(value).__name__}"
