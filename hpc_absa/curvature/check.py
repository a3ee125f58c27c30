"""A check before training that the Hessian of a model and loss can be computed, and is right."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from hpc_absa.comm import SerialCommunicator
from hpc_absa.curvature import fast
from hpc_absa.curvature.loss import Loss, check_mean, compare, mean_and_denominator
from hpc_absa.curvature.operator import (
    HessianOperator,
    HessianSample,
    evaluation_mode,
    uses_batch_statistics,
)
from hpc_absa.curvature.stochastic import random_vector
from hpc_absa.curvature.twice import CurvatureError, Exchange, custom_functions


def check_curvature(
    model: nn.Module, loss_fn: Loss, sample: HessianSample, *, microbatch: int
) -> list[str]:
    """Check the Hessian on one microbatch, on this rank alone. It costs about four products.

    Checked are: a second derivative exists; the loss is a mean over samples, or states its
    denominator; the Hessian is symmetric; and if the model uses custom autograd functions, it is
    the derivative of the gradient, by differences in float64.

    Returns:
        What a user should know: a sentence for each function that costs more in the Hessian.

    Raises:
        CurvatureError: one line that names what the model or the loss does, and the remedy.
    """
    samples = min(microbatch, sample.size)
    with evaluation_mode(model):
        operator = HessianOperator(
            model, loss_fn, sample, SerialCommunicator(), samples=samples, microbatch=samples
        )
        u, v = (random_vector(operator.gradient(), seed) for seed in (0, 1))
        _require_symmetric(u, v, operator.matvec(u), operator.matvec(v))
        operator.close()
        inputs, targets = sample.load(0, samples)
        with torch.no_grad():
            outputs = fast.forward(model, inputs, {}, fast.PLAIN)
            sliced = check_mean(loss_fn, outputs, targets, samples)
        if not sliced and samples > 1 and not uses_batch_statistics(model):
            _check_mean_of_halves(model, loss_fn, sample, samples)
        leaves = {name: fast.leaf(p, fast.PLAIN) for name, p in operator.parameters.items()}
        with _Seen() as seen:
            outputs = fast.forward(model, inputs, leaves, fast.PLAIN)
        with Exchange():
            loss, _ = mean_and_denominator(loss_fn, outputs, fast.copied(targets), samples)
        if names := custom_functions(loss):
            _check_differences(model, loss_fn, sample, samples, names)
    return [note for functions, note in _NOTES.items() if functions & seen.functions]


_NOTES = {
    frozenset({F.scaled_dot_product_attention, F.multi_head_attention_forward}): "Hessian: "
    "attention runs by plain operations, because fused kernels have no second derivative; it needs "
    "memory for every pair of tokens",
}


class _Seen(TorchFunctionMode):
    """Records the functions that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: set[Any] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.functions.add(func)
        return func(*args, **(kwargs or {}))


def _require_symmetric(u: Tensor, v: Tensor, hu: Tensor, hv: Tensor) -> None:
    difference = abs(float(u.double() @ hv.double() - v.double() @ hu.double()))
    size = float(hu.double().norm() * v.double().norm() + hv.double().norm() * u.double().norm())
    size /= len(u) ** 0.5  # of the product of two random vectors
    if difference > 0.02 * size:
        raise CurvatureError(
            "model or loss: its Hessian is not symmetric, so that a function it calls has a "
            "backward that is not its derivative; test yours with torch.autograd.gradgradcheck"
        )


def _check_mean_of_halves(
    model: nn.Module, loss_fn: Loss, sample: HessianSample, samples: int
) -> None:
    """As `check_mean`, for outputs that cannot be sliced. A model may refuse another batch size."""

    def value(start: int, stop: int) -> tuple[float, float]:
        inputs, targets = sample.load(start, stop)
        outputs = fast.forward(model, inputs, {}, fast.PLAIN)
        mean, denominator = mean_and_denominator(loss_fn, outputs, targets, stop - start)
        return float(mean), denominator

    cut = max(1, samples // 3)
    with torch.no_grad(), Exchange(), contextlib.suppress(RuntimeError, ValueError, TypeError):
        whole = value(0, samples)
        compare(*whole, [value(0, cut), value(cut, samples)], torch.float32)


def _check_differences(
    model: nn.Module, loss_fn: Loss, sample: HessianSample, samples: int, names: list[str]
) -> None:
    """Compare a product with a difference of gradients, where the model runs in float64."""
    inputs, targets = sample.load(0, samples)

    def double(value: Any) -> Any:
        return tree_map_only(
            Tensor, lambda t: t.detach().double() if t.is_floating_point() else t.clone(), value
        )

    fixed = double({**dict(model.named_parameters()), **dict(model.named_buffers())})
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]

    def gradient(points: list[Tensor], create_graph: bool = False) -> tuple[Tensor, ...]:
        given = double(inputs)
        args, kwargs = given if isinstance(given, fast.Arguments) else ((given,), {})
        tensors = {**double(fixed), **dict(zip(trainable, points, strict=True))}
        torch.manual_seed(0)
        with Exchange():
            outputs = functional_call(model, tensors, args, dict(kwargs))
            loss, _ = mean_and_denominator(loss_fn, outputs, double(targets), samples)
        return torch.autograd.grad(loss, points, create_graph=create_graph, materialize_grads=True)

    try:
        failures = [_difference(gradient, [fixed[n] for n in trainable], seed) for seed in (0, 1)]
    except (RuntimeError, TypeError):  # the model or its functions do not take float64
        return
    if min(failures) > 0.01:  # a kink of ReLU between the two points may spoil one of them
        raise CurvatureError(
            f"model or loss: a custom autograd function ({', '.join(names)}) has a wrong second "
            "derivative; write its backward with differentiable torch functions, and test it with "
            "torch.autograd.gradgradcheck"
        )


def _difference(gradient: Any, point: list[Tensor], seed: int) -> float:
    """Relative difference of `H v` and `(∇L(w + εv) − ∇L(w − εv)) / 2ε`."""
    generator = torch.Generator().manual_seed(seed)
    v = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in point]
    step = 1e-7
    leaves = [p.clone().requires_grad_() for p in point]
    slope = [(g, x) for g, x in zip(gradient(leaves, True), v, strict=True) if g.requires_grad]
    product = [torch.zeros_like(p) for p in point]
    if slope:
        slopes, vectors = zip(*slope, strict=True)
        product = list(torch.autograd.grad(slopes, leaves, vectors, materialize_grads=True))
    ends = []
    for sign in (1, -1):
        moved = [(p + sign * step * x).requires_grad_() for p, x in zip(point, v, strict=True)]
        ends.append(torch.cat([g.reshape(-1) for g in gradient(moved)]))
    expected = (ends[0] - ends[1]) / (2 * step)
    found = torch.cat([p.reshape(-1) for p in product])
    return float((found - expected).norm() / expected.norm().clamp(min=1e-300))
