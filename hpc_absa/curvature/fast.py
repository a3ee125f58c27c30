"""What makes a Hessian-vector product cost two gradients: see `docs/curvature.md` for figures.

`products(plan)` is a context in which the functions a model calls are exchanged for equal ones
whose second derivative is cheap. Whatever is not known here runs as it always does.

- Convolution: its double backward as three library calls instead of autograd's generic formula.
- Batch normalization in evaluation mode: an affine map per channel. Right after a convolution it is
  folded into that convolution's weight and bias and vanishes from the activations altogether.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hpc_absa.curvature.convolution import convolve


def arranged(tensor: Tensor) -> Tensor:
    """`tensor` in the memory order convolutions are fastest in: channels last, for images."""
    if tensor.dim() == 4 and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def leaf(parameter: Tensor) -> Tensor:
    """A copy of `parameter` to differentiate by, without its hooks."""
    return arranged(parameter.detach()).clone(memory_format=torch.preserve_format).requires_grad_()


@dataclass(frozen=True)
class Normalization:
    """A batch normalization in evaluation mode; its tensors by their names in the model."""

    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float

    def affine(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Scale `γ / √(σ² + ε)` and shift `β − μ · scale`, a value per channel."""
        scale = torch.rsqrt(tensors[self.var] + self.eps)
        if self.weight is not None:
            scale = tensors[self.weight] * scale
        shift = -tensors[self.mean] * scale
        if self.bias is not None:
            shift = tensors[self.bias] + shift
        return scale, shift


@dataclass(frozen=True)
class Plan:
    """Which convolutions (counted as the model calls them) are followed by which normalization."""

    folds: dict[int, Normalization] = field(default_factory=dict)


class PlanMismatchError(Exception):
    """The model does not call what it called when the plan was made."""


_QUERIES = frozenset(
    {
        Tensor.dim,
        Tensor.size,
        Tensor.numel,
        Tensor.is_floating_point,
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")),
    }
)
"""Questions about a tensor whose answers do not depend on its values."""

_CONVOLUTIONS: dict[Callable[..., Any], int] = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}


class _Exchange(TorchFunctionMode):
    """Sees each torch function a model calls and runs our own in its place where there is one."""

    def __init__(self, plan: Plan, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.plan, self.tensors, self.count = plan, tensors, 0
        self.folded: dict[int, tuple[Tensor, Normalization]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.folded and func not in _QUERIES:
            found = self._take(args, kwargs)
            if found is not None:
                output, expected = found
                if func is F.batch_norm and _normalization(self.tensors, args, kwargs) == expected:
                    return output
                raise PlanMismatchError
        if func in _CONVOLUTIONS:
            return self._convolution(func, args, kwargs)
        if func is F.batch_norm:
            return self._normalize(func, args, kwargs)
        return func(*args, **kwargs)

    def _take(self, args: Any, kwargs: Any) -> tuple[Tensor, Normalization] | None:
        for argument in tree_leaves((args, kwargs)):
            if id(argument) in self.folded:
                return self.folded.pop(id(argument))
        return None

    def _convolution(self, func: Any, args: Any, kwargs: Any) -> Any:
        call = _convolution_arguments(*args, **kwargs)
        fold = self.plan.folds.get(self.count)
        self.count += 1
        if isinstance(call["padding"], str) or call["x"].dim() != call["w"].dim():
            if fold is not None:
                raise PlanMismatchError
            return func(*args, **kwargs)
        if fold is None:
            return convolve(**call)
        scale, shift = fold.affine(self.tensors)
        call["w"] = call["w"] * scale.view(-1, *[1] * (call["w"].dim() - 1))
        call["b"] = shift if call["b"] is None else shift + scale * call["b"]
        output = convolve(**call)
        self.folded[id(output)] = output, fold
        return output

    def _normalize(self, func: Any, args: Any, kwargs: Any) -> Any:
        fold = _normalization(self.tensors, args, kwargs)
        if fold is None:
            return func(*args, **kwargs)
        x = _bound(*args, **kwargs)["x"]
        scale, shift = (t.view(1, -1, *[1] * (x.dim() - 2)) for t in fold.affine(self.tensors))
        return torch.addcmul(shift, x, scale)


def _convolution_arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> dict[str, Any]:
    return {
        "x": input, "w": weight, "b": bias, "stride": stride, "padding": padding,
        "dilation": dilation, "groups": groups,
    }  # fmt: skip


def _bound(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> dict[str, Any]:
    return {
        "x": input, "mean": running_mean, "var": running_var, "weight": weight, "bias": bias,
        "training": training, "eps": eps,
    }  # fmt: skip


def _normalization(tensors: Mapping[str, Tensor], args: Any, kwargs: Any) -> Normalization | None:
    """The call by names; None where it uses batch statistics or tensors not the model's own."""
    call = _bound(*args, **kwargs)
    if call["training"]:
        return None
    names: dict[str, str | None] = {}
    for role in ("weight", "bias", "mean", "var"):
        names[role] = next((n for n, t in tensors.items() if t is call[role]), None)
        if names[role] is None and (call[role] is not None or role in ("mean", "var")):
            return None
    return Normalization(**names, eps=call["eps"])  # type: ignore[arg-type]


class _Watch(TorchFunctionMode):
    """Finds the convolutions whose output nothing but one batch normalization looks at."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tensors, self.count = tensors, 0
        self.outputs: dict[int, tuple[int, Tensor]] = {}
        self.uses: dict[int, list[Normalization | None]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument in tree_leaves((args, kwargs)):
            if id(argument) in self.outputs and func not in _QUERIES:
                found = None
                if func is F.batch_norm:
                    found = _normalization(self.tensors, args, kwargs)
                self.uses.setdefault(self.outputs[id(argument)][0], []).append(found)
        result = func(*args, **kwargs)
        if func in _CONVOLUTIONS:
            if _plain(args, kwargs):
                self.outputs[id(result)] = self.count, result
            self.count += 1
        return result


def _plain(args: Any, kwargs: Any) -> bool:
    call = _convolution_arguments(*args, **kwargs)
    return not isinstance(call["padding"], str) and call["x"].dim() == call["w"].dim()


def plan(model: nn.Module, inputs: Tensor) -> Plan | None:
    """What can be exchanged in `model`, found by running it on one sample; None where nothing can.

    The exchanged model must then give the same output on that sample, or the plan is dropped.
    """
    tensors = {k: t.detach().clone() for k, t in _state(model).items()}
    one = inputs[:1]
    with torch.no_grad(), _Watch(tensors) as watch:
        expected = functional_call(model, tensors, (one,))
    candidates = {
        call: uses[0] for call, uses in watch.uses.items() if len(uses) == 1 and uses[0] is not None
    }
    for folds in (candidates, {}):
        made = Plan(folds)
        tensors = {k: t.detach().clone() for k, t in _state(model).items()}
        try:
            with torch.no_grad(), products(made, tensors):
                result = functional_call(model, tensors, (one,))
        except PlanMismatchError:
            continue
        if _same(result, expected):
            return made
    return None


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _same(result: Any, expected: Any) -> bool:
    """Equal up to rounding; NaN equals NaN, as a broken model is no reason to slow down."""
    pairs = zip(tree_leaves(result), tree_leaves(expected), strict=True)
    return all(
        bool(
            torch.linalg.vector_norm((a - b).nan_to_num())
            <= 1e-4 * torch.linalg.vector_norm(b.nan_to_num()) + 1e-30
        )
        for a, b in pairs
        if isinstance(b, Tensor) and b.is_floating_point()
    )


@contextmanager
def products(made: Plan | None, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Exchange functions as planned; `tensors` are what the model runs on, by name."""
    if made is None:
        yield
        return
    exchange = _Exchange(made, tensors)
    with exchange:
        yield
    if exchange.folded:
        raise PlanMismatchError
