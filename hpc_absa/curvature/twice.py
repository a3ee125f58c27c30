"""Functions that torch cannot differentiate twice, or not correctly, and equal ones that it can.

`Exchange` replaces them while a model or a loss runs. What is not known here is refused by name.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from hpc_absa.errors import UsageError


class CurvatureError(UsageError):
    """The Hessian of this model or loss cannot be computed; the message names call and remedy."""


class Exchange(TorchFunctionMode):
    """Calls an equal function, which can be differentiated twice, where one is known."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _EXCHANGES.get(func, func)(*args, **(kwargs or {}))


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    output = F.hardtanh(input + 3, 0.0, 6.0) / 6
    return input.copy_(output) if inplace else output


def _hardsigmoid_(input: Tensor) -> Tensor:
    return _hardsigmoid(input, inplace=True)


def _attention(*args: Any, **kwargs: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*args, **kwargs)


def _multi_head_attention(*args: Any, **kwargs: Any) -> Any:
    with sdpa_kernel(SDPBackend.MATH):
        return F.multi_head_attention_forward(*args, **kwargs)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`g v / ‖v‖`: torch's own has a wrong second derivative (2.13, `gradgradcheck`)."""
    if dim == -1:
        return v * (g / torch.linalg.vector_norm(v))
    others = [d for d in range(v.dim()) if d != dim]
    return v * (g / torch.linalg.vector_norm(v, dim=others, keepdim=True))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """With a dense gradient that is not scaled."""
    return F.embedding(input, weight, padding_idx, max_norm, norm_type)


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Bags of an embedding; with `max` the original, which is then refused."""
    if mode == "max":
        return F.embedding_bag(
            input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, False,
            per_sample_weights, include_last_offset, padding_idx,
        )  # fmt: skip
    if offsets is None:
        count, size = input.shape
        bags = torch.arange(count, device=input.device).repeat_interleave(size)
    else:
        offsets = offsets[:-1] if include_last_offset else offsets
        count, order = len(offsets), torch.arange(len(input), device=input.device)
        bags = torch.searchsorted(offsets.to(order.dtype), order, right=True) - 1
    indices = input.reshape(-1)
    rows = F.embedding(indices, weight, None, max_norm, norm_type)
    factors = torch.ones(len(indices), dtype=weight.dtype, device=weight.device)
    if padding_idx is not None:
        factors = (indices != padding_idx).to(weight.dtype)
    sizes = torch.zeros_like(factors[:1]).expand(count).index_add(0, bags, factors)
    if per_sample_weights is not None:
        factors = factors * per_sample_weights.reshape(-1)
    rows = rows * factors[:, None]
    total = torch.zeros_like(weight[:1]).expand(count, -1).index_add(0, bags, rows)
    return total / sizes.clamp(min=1)[:, None] if mode == "mean" else total


def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    return torch.linalg.vector_norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, dim=-1)


def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    i, j = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return torch.linalg.vector_norm(input[i] - input[j], p, dim=-1)


def _multi_margin_loss(
    input: Tensor,
    target: Tensor,
    p: int = 1,
    margin: float = 1.0,
    weight: Tensor | None = None,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
) -> Tensor:
    scores, labels = (input[None], target[None]) if input.dim() == 1 else (input, target)
    own = scores.gather(1, labels[:, None])
    excess = (margin - own + scores).clamp(min=0) ** p
    if weight is not None:
        excess = excess * weight[labels][:, None]
    others = torch.ones_like(scores).scatter(1, labels[:, None], 0)
    losses = (excess * others).sum(1) / scores.shape[1]
    if reduction == "none":
        return losses[0] if input.dim() == 1 else losses
    return losses.sum() if reduction == "sum" else losses.mean()


_EXCHANGES: dict[Any, Callable[..., Any]] = {
    F.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid: _hardsigmoid,
    torch._C._nn.hardsigmoid_: _hardsigmoid_,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    torch._weight_norm: _weight_norm,
    F.embedding: _embedding,
    F.embedding_bag: _embedding_bag,
    torch.cdist: _cdist,
    torch.pdist: _pdist,
    F.pdist: _pdist,
    F.multi_margin_loss: _multi_margin_loss,
}


@contextmanager
def plain_autograd() -> Iterator[None]:
    """Run what activation checkpointing and `torch.compile` wrap as it is.

    A checkpointed function runs again in the backward pass, on the model's parameters instead of
    those that are differentiated, and so would lose second derivatives. Compiled code has none.
    """
    module = torch.utils.checkpoint
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "CheckpointFunction", _Call))
        stack.enter_context(
            mock.patch.object(module, "_checkpoint_without_reentrant_generator", _nothing)
        )
        if "torch._dynamo" in sys.modules:  # imported with the first torch.compile
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _Call:
    """In place of `CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _nothing(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield


def require_supported(model: nn.Module) -> None:
    """Refuse what is known to have no second derivative from the model alone."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise CurvatureError(
                f"model: {name or type(module).__name__} is a TorchScript module, which cannot be "
                "differentiated twice with replaced parameters; use the Python module it was "
                "made from"
            )
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.is_complex():
            raise CurvatureError(
                f"model: the parameter {name} is complex, and a Hessian needs real parameters; "
                "store its real and imaginary parts (torch.view_as_real) and use "
                "torch.view_as_complex in forward"
            )
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise CurvatureError(
                f"model: the parameter {name} has no shape yet; run the model once before"
            )


_NOT_IMPLEMENTED = re.compile(
    r"derivative for '?(?:aten::)?(\w+?)(?:_backward)?'? is not implemented"
)
_NO_DOUBLE_BACKWARD = ("double backward", "differentiated twice", "differentiate twice")


@contextmanager
def named_errors(loss: Tensor) -> Iterator[None]:
    """Turn autograd's errors about a missing second derivative into a `CurvatureError`."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if match := _NOT_IMPLEMENTED.search(text):
            raise CurvatureError(
                f"model or loss: it calls {match[1].strip('_')}, which torch cannot differentiate "
                "twice, as the Hessian needs; replace it by an equal function made of simpler "
                "ones, or use a schedule without eigenvalues"
            ) from error
        if any(part in text for part in _NO_DOUBLE_BACKWARD):
            raise _custom(custom_functions(loss) or [text.splitlines()[0]]) from error
        raise


def require_twice_differentiable(loss: Tensor, gradient: Iterable[Tensor]) -> None:
    """Refuse functions marked as `once_differentiable`, for which autograd raises no error if
    it is asked for some gradients only.
    """
    names = custom_functions(loss)
    if names and any(node.name() == "torch::autograd::Error" for node in _nodes(gradient)):
        raise _custom(names)


def _custom(names: list[str]) -> CurvatureError:
    return CurvatureError(
        f"model or loss: it uses a function that cannot be differentiated twice "
        f"({', '.join(names)}), as the Hessian needs; write its backward with differentiable torch "
        "functions, or use a schedule without eigenvalues"
    )


def custom_functions(loss: Tensor) -> list[str]:
    """The `torch.autograd.Function` classes in the graph of `loss`, without those of `fast`."""
    names: dict[str, None] = {}
    for node in _nodes([loss]):
        ours = type(node).__module__.startswith("hpc_absa.")
        if isinstance(node, BackwardCFunction) and not ours:
            names[type(node).__name__.removesuffix("Backward")] = None
        elif "CppNode" in node.name() or "CppFunction" in type(node).__name__:
            names[node.name()] = None
    return list(names)


def _nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """The nodes of the graph of `tensors`."""
    seen: set[Any] = set()
    stack: list[Any] = [tensor.grad_fn for tensor in tensors]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            stack.extend(following for following, _ in node.next_functions)
