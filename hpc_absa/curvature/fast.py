"""Forward passes whose second derivative is cheap: a Hessian-vector product for two gradients.

`forward` runs a model and replaces the functions it calls by equal ones with a cheap second
derivative. Functions not known here run unchanged. For measurements see `docs/curvature.md`.

- Convolution: its double backward as three library calls instead of autograd's generic formula.
- Batch normalization in evaluation mode: an affine map per channel. Directly after a convolution
  it is folded into the convolution's weight and bias, and costs nothing per activation.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from hpc_absa.curvature.convolution import Convolution, Geometry
from hpc_absa.curvature.twice import Exchange

Tensors = Mapping[str, Tensor]
"""What a model runs on: parameters and buffers by name."""


class Arguments(NamedTuple):
    """Inputs of a model that is called as `model(*args, **kwargs)`."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


def arranged(tensor: Tensor) -> Tensor:
    """`tensor` in the memory format in which convolutions are fastest: channels last in 4-D."""
    if tensor.dim() == 4 and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return tensor.contiguous(memory_format=torch.channels_last)
    return tensor


def leaf(parameter: Tensor, plan: Plan) -> Tensor:
    """A copy of `parameter` to differentiate by, without its hooks."""
    tensor = parameter.detach()
    if plan.channels_last:
        tensor = arranged(tensor)
    return tensor.clone(memory_format=torch.preserve_format).requires_grad_()


def copied(inputs: Any) -> Any:
    """A copy that a model or a loss can change in place; memory formats are kept."""
    return tree_map(
        lambda x: x.detach().clone() if isinstance(x, Tensor) else copy.deepcopy(x), inputs
    )


def forward(model: nn.Module, inputs: Any, leaves: Tensors, plan: Plan) -> Any:
    """`model(inputs)` with `leaves` in place of their parameters; the others are constants.

    The model runs on copies: no parameter hook fires, and what a module writes to a buffer or to
    its inputs is discarded. Random numbers are the same in every call.

    Raises:
        PlanMismatchError: the model does not call what it called when the plan was made.
    """
    tensors = _tensors(model, leaves)
    if not plan.accelerate:
        with Exchange():
            return _call(model, tensors, inputs)
    with _Replace(plan, tensors) as mode:
        outputs = _call(model, tensors, inputs)
    mode.require_completed(outputs)
    return outputs


def _tensors(model: nn.Module, leaves: Tensors) -> Tensors:
    fixed = {n: p.detach() for n, p in model.named_parameters() if n not in leaves}
    return {**leaves, **fixed, **{name: b.clone() for name, b in model.named_buffers()}}


def _call(model: nn.Module, tensors: Tensors, inputs: Any) -> Any:
    random.seed(0)
    np.random.seed(0)
    torch.default_generator.manual_seed(0)
    devices = {t.device.index for t in tensors.values() if t.device.type == "cuda"}
    for index in devices:
        torch.cuda.default_generators[index].manual_seed(0)
    inputs = copied(inputs)
    args, kwargs = inputs if isinstance(inputs, Arguments) else ((inputs,), {})
    return functional_call(model, dict(tensors), args, dict(kwargs))


@dataclass(frozen=True)
class Normalization:
    """A batch normalization in evaluation mode; its tensors by their names in the model."""

    weight: str | None
    bias: str | None
    mean: str
    var: str
    eps: float

    def affine(self, tensors: Tensors) -> tuple[Tensor, Tensor]:
        """Scale `γ / √(σ² + ε)` and shift `β − μ · scale`, one value per channel."""
        scale = torch.rsqrt(tensors[self.var] + self.eps)
        if self.weight is not None:
            scale = tensors[self.weight] * scale
        shift = -tensors[self.mean] * scale
        if self.bias is not None:
            shift = tensors[self.bias] + shift
        return scale, shift


@dataclass(frozen=True)
class Plan:
    """What is replaced in a model."""

    folds: Mapping[int, Normalization] = field(default_factory=dict)
    """The normalization to fold into each convolution, by the order in which these are called."""
    channels_last: bool = False
    """Convolutions run in channels-last layout. The model's inputs keep the sample's layout. On a
    GPU all keep the layout that they have."""
    accelerate: bool = True
    """False: only functions without a (right) second derivative are replaced."""


PLAIN = Plan(accelerate=False)


class PlanMismatchError(Exception):
    """The model does not call what it called when the plan was made."""


_PLANS: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def plan_of(model: nn.Module, load: Callable[[], Any]) -> Plan:
    """The plan for `model`, made once, on the inputs that `load` returns.

    A model that has changed since is right as well: each forward pass checks its plan.
    """
    if model not in _PLANS:
        _PLANS[model] = make_plan(model, load())
    return _PLANS[model]


def make_plan(model: nn.Module, inputs: Any) -> Plan:
    """Find what can be replaced in `model` by running it on `inputs`.

    With the replacements the model must give the same output up to rounding, and must not fail,
    as models do that use `.view` on a channels-last output.
    """
    tensors = _tensors(model, {})
    with torch.no_grad(), _Watch(tensors) as watch:
        expected = _call(model, tensors, inputs)
    if not watch.replaceable:
        return PLAIN
    folds = {
        call: uses[0] for call, uses in watch.uses.items() if len(uses) == 1 and uses[0] is not None
    }
    for channels_last in (True, False) if watch.arranges_images else (False,):
        for plan in (Plan(folds, channels_last), *([Plan({}, channels_last)] if folds else [])):
            try:
                with torch.no_grad():
                    leaves = {n: leaf(p, plan) for n, p in model.named_parameters()}
                    outputs = forward(model, inputs, leaves, plan)
                if _same(outputs, expected):
                    return plan
            except Exception:  # the model runs without replacements, so these are the reason
                continue
    return PLAIN


def _same(outputs: Any, expected: Any) -> bool:
    """Equal up to rounding; NaN equals NaN, because a diverged model needs no slower products."""
    pairs = [
        (a, b)
        for a, b in zip(tree_leaves(outputs), tree_leaves(expected), strict=True)
        if isinstance(b, Tensor) and b.is_floating_point()
    ]
    return bool(pairs) and all(
        torch.equal(a.isnan(), b.isnan())
        and bool(
            torch.linalg.vector_norm((a - b).nan_to_num())
            <= 1e-4 * torch.linalg.vector_norm(b.nan_to_num()) + 1e-30
        )
        for a, b in pairs
    )


_QUERIES = frozenset(
    {
        Tensor.dim,
        Tensor.size,
        Tensor.numel,
        Tensor.is_floating_point,
        *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")),
    }
)
"""Functions of a tensor that do not depend on its values."""

_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


class _ConvolutionCall(NamedTuple):
    """The arguments of `F.conv1d`, `F.conv2d` and `F.conv3d`."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1

    @property
    def supported(self) -> bool:
        """Batched, and without padding by name."""
        return not isinstance(self.padding, str) and self.input.dim() == self.weight.dim()

    def run(self, channels_last: bool) -> Tensor:
        """The convolution, with the cheap second derivative."""
        n = self.weight.dim() - 2
        stride, padding, dilation = (
            (value,) * n if isinstance(value, int) else tuple(value) * (n // len(value))
            for value in (self.stride, self.padding, self.dilation)
        )
        geometry = Geometry(stride, padding, dilation, self.groups)
        x = arranged(self.input) if channels_last else self.input
        return Convolution.apply(x, self.weight, self.bias, geometry)


class NormalizationCall(NamedTuple):
    """The arguments of `F.batch_norm`."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5

    def by_name(self, tensors: Tensors) -> Normalization | None:
        """None with batch statistics, or with tensors that are not the model's."""
        names = {id(tensor): name for name, tensor in tensors.items()}
        weight, bias = names.get(id(self.weight)), names.get(id(self.bias))
        mean, var = names.get(id(self.running_mean)), names.get(id(self.running_var))
        unnamed = (weight is None) != (self.weight is None) or (bias is None) != (self.bias is None)
        if self.training or unnamed or mean is None or var is None:
            return None
        return Normalization(weight, bias, mean, var, self.eps)


def _arguments(values: Iterable[Any]) -> Iterator[Any]:
    """Also those inside lists and dicts."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _arguments(value)
        elif isinstance(value, dict):
            yield from _arguments(value.values())
        else:
            yield value


class _Watch(TorchFunctionMode):
    """Records what uses the output of each convolution: a normalization, or None for others."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.tensors, self.count = tensors, 0
        self.replaceable = self.arranges_images = False
        self.outputs: dict[int, tuple[int, Tensor]] = {}
        self.uses: dict[int, list[Normalization | None]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument in _arguments((args, kwargs)):
            if id(argument) in self.outputs and func not in _QUERIES:
                use = None
                if func is F.batch_norm:
                    use = NormalizationCall(*args, **kwargs).by_name(self.tensors)
                self.uses.setdefault(self.outputs[id(argument)][0], []).append(use)
        output = func(*args, **kwargs)
        self.replaceable |= func in _CONVOLUTIONS or func is F.batch_norm
        if func in _CONVOLUTIONS:
            if _ConvolutionCall(*args, **kwargs).supported:
                self.outputs[id(output)] = self.count, output
            self.count += 1
            self.arranges_images |= func is F.conv2d and not output.is_cuda
        return output


@dataclass
class _Folded:
    """A convolution's output that already contains the normalization that is called next."""

    output: Tensor
    normalization: Normalization
    placeholder: Tensor
    """What the model receives as the convolution's output: NaN, so that a use that is not seen
    here never gives a number."""
    used: bool = False


class _Replace(Exchange):
    """Calls a replacement for each torch function that has one."""

    def __init__(self, plan: Plan, tensors: Tensors) -> None:
        super().__init__()
        self.plan, self.tensors, self.count, self.mismatch = plan, tensors, 0, False
        self.folded: dict[int, _Folded] = {}
        """By the id of the placeholder."""

    def require_completed(self, outputs: Any) -> None:
        """The model has used each placeholder exactly once, by its normalization."""
        leaked = any(id(output) in self.folded for output in tree_leaves(outputs))
        if self.mismatch or leaked or not all(folded.used for folded in self.folded.values()):
            raise PlanMismatchError

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.folded and func not in _QUERIES:
            for argument in _arguments((args, kwargs)):
                if (folded := self.folded.get(id(argument))) is not None:
                    if func is not F.batch_norm or folded.used:
                        self._fail()
                    call = NormalizationCall(*args, **kwargs)
                    if call.by_name(self.tensors) != folded.normalization:
                        self._fail()
                    folded.used = True
                    return folded.output
        if func in _CONVOLUTIONS:
            return self._convolution(func, _ConvolutionCall(*args, **kwargs))
        if func is F.batch_norm:
            call = NormalizationCall(*args, **kwargs)
            normalization = call.by_name(self.tensors)
            if normalization is not None:
                shape = (1, -1, *[1] * (call.input.dim() - 2))
                scale, shift = (t.view(shape) for t in normalization.affine(self.tensors))
                return torch.addcmul(shift, call.input, scale)
        return super().__torch_function__(func, types, args, kwargs)

    def _fail(self) -> None:
        self.mismatch = True  # also if the model catches the exception
        raise PlanMismatchError

    def _convolution(self, func: Any, call: _ConvolutionCall) -> Any:
        fold = self.plan.folds.get(self.count)
        self.count += 1
        if not call.supported:
            if fold is not None:
                self._fail()
            return func(*call)
        if fold is None:
            return call.run(self.plan.channels_last)
        scale, shift = fold.affine(self.tensors)
        weight = call.weight * scale.view(-1, *[1] * (call.weight.dim() - 1))
        bias = shift if call.bias is None else shift + scale * call.bias
        output = call._replace(weight=weight, bias=bias).run(self.plan.channels_last)
        placeholder = output.new_full((), torch.nan).expand(output.shape)
        self.folded[id(placeholder)] = _Folded(output, fold, placeholder)
        return placeholder
