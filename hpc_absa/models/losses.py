"""Losses by name; a loss maps outputs [b, classes] and targets [b] to the mean over the batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from hpc_absa import plugins
from hpc_absa.errors import UsageError

if TYPE_CHECKING:
    import torch

    Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build_loss(name: str, arguments: Mapping[str, Any] | None = None) -> Loss:
    """A loss: `(outputs, targets) → scalar`, the mean over the samples.

    Args:
        name: `"cross_entropy"`, or `"package.module:name"`: a function called with outputs,
            targets and `arguments`, or a class such as `"torch.nn:MultiMarginLoss"`, made with
            `arguments` once.
        arguments: For `cross_entropy`: `label_smoothing`, from 0 to 1.

    Raises:
        UsageError: Unknown name, or arguments that it has not.
    """
    given = dict(arguments or {})
    if plugins.is_reference(name):
        target = plugins.resolve(name, "loss.name")
        return (
            plugins.call(target, "loss", given, {})
            if inspect.isclass(target)
            else _bound(target, given)
        )
    if name != "cross_entropy":
        raise UsageError(
            f'loss.name: no loss "{name}", expected "cross_entropy" or your own as '
            '"package.module:function"'
        )
    return plugins.call(_cross_entropy, "loss", given, {}, name)


def _cross_entropy(label_smoothing: float = 0.0) -> Loss:
    from torch.nn import functional

    if not 0.0 <= label_smoothing < 1.0:
        raise UsageError(f"loss.label_smoothing: {label_smoothing}, expected from 0 to below 1")
    return partial(functional.cross_entropy, label_smoothing=label_smoothing)


def _bound(function: Callable[..., Any], arguments: dict[str, Any]) -> Loss:
    """`function` with the job's arguments, after making sure that it takes them."""
    try:
        inspect.signature(function).bind(None, None, **arguments)
    except TypeError as error:
        raise UsageError(
            f"loss: {getattr(function, '__name__', function)} cannot be called with outputs, "
            f"targets and {list(arguments) or 'no arguments'}: {error}"
        ) from error
    except ValueError:  # written in C: it does not tell
        pass
    return partial(function, **arguments)
