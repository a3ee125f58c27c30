"""What a loss is divided by, so that its value does not depend on the microbatches.

The Hessian is that of the loss over the whole sample: `Σ s_m / Σ d_m`, where microbatch m has the
sum s_m and the denominator d_m. Most losses are a mean over samples: d_m is the number of samples.
Others state it:

- a loss may return `(sum, denominator)` instead of one number, or
- a loss that returns `sum / denominator` may have a function `denominator(targets)` as attribute.

Of torch's own losses (`torch.nn` and `torch.nn.functional`, also in `functools.partial`) it is
known: `reduction="sum"` is divided by the number of samples, and with class weights or
`ignore_index` cross entropy and NLL by the weights of the targets that are not ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from hpc_absa.curvature.fast import copied
from hpc_absa.curvature.twice import CurvatureError

Loss = Callable[[Any, Any], Any]
"""`loss_fn(outputs, targets)`: a mean over the microbatch, or `(sum, denominator)`."""

_REMEDY = (
    "return (sum, denominator), or give the loss an attribute denominator(targets): what it "
    "divides the sum of a batch by"
)


def mean_and_denominator(
    loss_fn: Loss, outputs: Any, targets: Any, samples: int
) -> tuple[Tensor, float]:
    """The loss of a microbatch as `s / d`, a scalar, and d; d = 0 means that it has no loss.

    Raises:
        CurvatureError: the loss is not one real number.
    """
    return split(loss_fn, loss_fn(outputs, targets), targets, samples)


def split(loss_fn: Loss, result: Any, targets: Any, samples: int) -> tuple[Tensor, float]:
    """As `mean_and_denominator`, of a result that `loss_fn` has returned."""
    if isinstance(result, tuple):
        if len(result) != 2:
            raise CurvatureError(
                f"loss: expected one number or (sum, denominator), got {len(result)} values"
            )
        total, denominator = _scalar(result[0]), _number(result[1])
        return total / (denominator or 1.0), denominator
    value = _scalar(result)
    if (stated := _stated(loss_fn)) is not None:
        return value, _number(stated(targets))
    settings = _settings(loss_fn) or {}
    if settings.get("reduction") == "sum":
        return value / samples, float(samples)
    if settings.get("indexed") and isinstance(targets, Tensor) and not targets.is_floating_point():
        kept = targets != settings.get("ignore_index", -100)
        weight = settings.get("weight")
        if weight is None:
            return value, float(kept.sum())
        return value, float(weight.double()[targets[kept]].sum())
    return value, float(samples)


def _stated(loss_fn: Any) -> Any:
    """The function `denominator` of a loss, also in `functools.partial`, as job files have it."""
    stated = getattr(loss_fn, "denominator", None)
    if stated is None and isinstance(loss_fn, partial):
        return _stated(loss_fn.func)
    return stated


def _settings(loss_fn: Any) -> dict[str, Any] | None:
    """The settings of one of torch's losses, `indexed` if its targets are classes; else None."""
    settings: dict[str, Any] = {}
    if isinstance(loss_fn, partial) and not loss_fn.args:
        loss_fn, settings = loss_fn.func, loss_fn.keywords
    if isinstance(loss_fn, nn.Module):
        if type(loss_fn).__module__ != "torch.nn.modules.loss":
            return None
        names = ("reduction", "weight", "ignore_index")
        settings = {n: getattr(loss_fn, n) for n in names if hasattr(loss_fn, n)}
        return {**settings, "indexed": isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss)}
    if getattr(loss_fn, "__module__", "") != F.__name__:
        return None
    return {**settings, "indexed": loss_fn in (F.cross_entropy, F.nll_loss)}


def _scalar(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise CurvatureError(f"loss: expected a tensor, got {type(value).__name__}")
    if value.numel() != 1 or not value.is_floating_point():
        raise CurvatureError(
            f"loss: expected one real number, got {value.dtype} of shape {list(value.shape)}; "
            "average it over the samples"
        )
    return value.reshape(())


def _number(denominator: Any) -> float:
    if isinstance(denominator, Tensor) and denominator.requires_grad:
        raise CurvatureError("loss: its denominator depends on the parameters; it must not")
    value = float(denominator)
    if not 0 <= value < math.inf:
        raise CurvatureError(f"loss: expected a finite denominator of 0 or more, got {value}")
    return value


def sample_losses(loss_fn: Loss, outputs: Any, targets: Any, samples: int) -> Tensor:
    """The loss of each sample of a batch, summed where it has several terms, [n] float64.

    Torch's own losses give those of all samples in one call, others one by one.

    Raises:
        CurvatureError: outputs or targets have no axis of samples.
    """
    if (unreduced := _unreduced(loss_fn)) is not None:
        each = unreduced(outputs, targets)
        if not each.dim() or len(each) != samples:
            raise CurvatureError("loss: outputs without an axis of samples")
        return each.reshape(samples, -1).sum(1).double().cpu()
    values = []
    for index in torch.arange(samples).split(1):
        taken, axis = _take(outputs, index, samples)
        taken_targets, targets_axis = _take(targets, index, samples)
        if not axis or targets_axis is False:
            raise CurvatureError("loss: outputs or targets without an axis of samples")
        value, denominator = mean_and_denominator(loss_fn, taken, taken_targets, 1)
        values.append(value * denominator if denominator else torch.zeros_like(value))
    return torch.stack(values).double().cpu()


def _unreduced(loss_fn: Any) -> Any:
    """One of torch's losses with `reduction="none"`; None for others."""
    if _settings(loss_fn) is None:
        return None
    if not isinstance(loss_fn, nn.Module):
        return partial(loss_fn, reduction="none")
    unreduced: Any = copy(loss_fn)
    unreduced.reduction = "none"
    return unreduced


def check_mean(loss_fn: Loss, outputs: Any, targets: Any, samples: int) -> bool:
    """Check that the loss of a batch is the mean, by denominators, of the losses of its parts.

    The parts are slices of `outputs` and `targets`, so the model is not called. The losses of
    torch are known to be means.

    Returns:
        False if it cannot be checked: one sample, or outputs without an axis of samples.

    Raises:
        CurvatureError: the loss is not such a mean; the message names the remedy.
    """
    if _settings(loss_fn) is not None:
        return True
    if samples < 2:
        return False
    order = torch.arange(samples)
    third = max(1, samples // 3)
    checked = False
    with torch.no_grad():
        whole, denominator = mean_and_denominator(
            loss_fn, copied(outputs), copied(targets), samples
        )
        for part in (order < samples // 2, order < third, order % 2 == 0):
            pieces = []
            for chosen in (order[part], order[~part]):
                taken, axis = _take(outputs, chosen, samples)
                taken_targets, targets_axis = _take(targets, chosen, samples)
                if not axis or targets_axis is False:
                    return checked
                try:
                    piece = mean_and_denominator(loss_fn, taken, taken_targets, len(chosen))
                except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
                    return checked
                pieces.append((float(piece[0]), piece[1]))
            compare(float(whole), denominator, pieces, whole.dtype)
            checked = True
    return checked


def compare(
    whole: float, denominator: float, pieces: list[tuple[float, float]], dtype: torch.dtype
) -> None:
    """Require that a batch's mean and denominator are those of its pieces together."""
    total = sum(d for _, d in pieces)
    mean = sum(value * d for value, d in pieces if d) / (total or 1.0)
    if not (math.isfinite(whole) and math.isfinite(mean)):
        return
    tolerance = 2e-4 if dtype in (torch.float32, torch.float64) else 3e-2
    size = max(abs(whole), *(abs(value) for value, d in pieces if d), 1e-30)
    if abs(total - denominator) > 1e-4 * max(total, denominator):
        raise CurvatureError(
            f"loss: the denominator of a batch is {denominator:g}, but {total:g} added over its "
            f"parts; {_REMEDY}"
        )
    if abs(mean - whole) > tolerance * size:
        raise CurvatureError(
            f"loss: it is not a mean over samples: {whole:g} for a batch, but {mean:g} averaged "
            f"over its parts; {_REMEDY}"
        )


def _take(value: Any, chosen: Tensor, samples: int) -> tuple[Any, bool | None]:
    """The chosen samples of a nested value; whether it has an axis of samples, None: no tensors."""
    axes = [
        bool(leaf.dim()) and len(leaf) == samples
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor)
    ]
    if type(value) in (list, tuple) and len(value) == samples and axes and not all(axes):
        return type(value)(value[i] for i in chosen.tolist()), True
    taken = tree_map_only(
        Tensor,
        lambda t: t[chosen.to(t.device)] if t.dim() and len(t) == samples else t,
        value,
    )
    return taken, any(axes) if axes else None
