"""The layers of a traced model that can be quantized, and what connects them.

`torch.fx` records the model as a graph, in which batch norms are folded into the convolution or
linear layer before them, and additions show which layers' outputs meet.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from hpc_absa.errors import UsageError, first_line

Quantizable = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)

_ADDITIONS = (operator.add, operator.iadd, torch.add)
_THROUGH = (_BatchNorm, nn.Identity, nn.Dropout, nn.Dropout2d)


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer."""

    name: str
    """Of the module in the model."""
    parameters: int
    """Of its weight."""
    macs: int
    """Multiplications for one sample."""


@dataclass(frozen=True)
class Network:
    """A model as a graph, with its quantizable layers."""

    folded: fx.GraphModule
    """In evaluation mode, without batch norms where they can be folded; of its own weights."""
    layers: tuple[Layer, ...]
    """In the order of the forward pass."""
    added: tuple[tuple[int, ...], ...]
    """Layers whose outputs are added, by index: a shortcut's and the one it is added to."""


def trace(model: nn.Module, inputs: Tensor) -> Network:
    """The layers of a model, which is not changed.

    Args:
        model: traceable by `torch.fx`: control flow does not depend on values.
        inputs: one sample, [1, ...], on the model's device.

    Raises:
        UsageError: it cannot be traced, or has no layer that can be quantized.
    """
    copied = copy.deepcopy(model).eval()
    try:
        graph = fx.symbolic_trace(copied)
    except Exception as error:  # whatever a model does with a proxy in place of a tensor
        raise UsageError(
            f"quantize: {type(model).__name__} cannot be traced by torch.fx "
            f"({type(error).__name__}: {first_line(error)}); expected a forward pass whose control "
            "flow does not depend on values"
        ) from None
    names = list(dict.fromkeys(str(node.target) for node in _layer_nodes(graph)))
    if not names:
        raise UsageError(
            f"quantize: {type(model).__name__} has no convolution or linear layer to quantize; "
            "expected torch.nn.Conv1d, Conv2d, Conv3d or Linear"
        )
    modules = dict(graph.named_modules())
    macs = _macs(graph, names, inputs)
    layers = tuple(Layer(name, modules[name].weight.numel(), macs[name]) for name in names)
    added = _added(graph, names)
    _fold(graph, macs)
    return Network(graph.eval(), layers, added)


def _layer_nodes(graph: fx.GraphModule) -> Iterator[fx.Node]:
    modules = dict(graph.named_modules())
    for node in graph.graph.nodes:
        if node.op == "call_module" and type(modules[str(node.target)]) in Quantizable:
            yield node


def _macs(graph: fx.GraphModule, names: list[str], inputs: Tensor) -> dict[str, int]:
    counts = dict.fromkeys(names, 0)
    modules, hooks = dict(graph.named_modules()), []

    def count(name: str, module: nn.Module, outputs: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        counts[name] += outputs.numel() * weight[0].numel()  # of one sample

    for name in names:
        hook = lambda module, args, outputs, name=name: count(name, module, outputs)  # noqa: E731
        hooks.append(modules[name].register_forward_hook(hook))
    try:
        with torch.no_grad():
            graph(inputs)
    finally:
        for handle in hooks:
            handle.remove()
    return counts


def _fold(graph: fx.GraphModule, macs: Mapping[str, int]) -> None:
    """Fold each batch norm into the layer before it, if nothing else uses that layer's output."""
    modules = dict(graph.named_modules())
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(modules[str(node.target)], _BatchNorm):
            continue
        norm, before = modules[str(node.target)], node.args[0]
        if norm.running_mean is None or not isinstance(before, fx.Node):
            continue
        name = str(before.target)
        if before.op != "call_module" or len(before.users) > 1 or calls.count(name) > 1:
            continue
        layer = modules[name]
        if type(layer) not in Quantizable:
            continue
        if isinstance(layer, nn.Linear) and macs[name] > layer.weight.numel():
            continue  # used for each part of a sample: its outputs are not the channels of the norm
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        parent, _, last = name.rpartition(".")
        setattr(graph.get_submodule(parent), last, fuse(layer, norm))
        modules[name] = graph.get_submodule(name)
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()


def _added(graph: fx.GraphModule, names: list[str]) -> tuple[tuple[int, ...], ...]:
    modules = dict(graph.named_modules())
    group = {name: {name} for name in names}
    for node in graph.graph.nodes:
        method = node.op == "call_method" and node.target in ("add", "add_")
        if not method and not (node.op == "call_function" and node.target in _ADDITIONS):
            continue
        sources = [_source(argument, modules, names) for argument in node.args[:2]]
        if len(sources) < 2 or None in sources:
            continue
        union = set().union(*(group[name] for name in sources if name))
        for name in union:
            group[name] = union
    sets = {frozenset(union) for union in group.values() if len(union) > 1}
    return tuple(sorted(tuple(sorted(names.index(name) for name in union)) for union in sets))


def _source(node: object, modules: dict[str, nn.Module], names: list[str]) -> str | None:
    """The layer whose output an operand is, but for a batch norm or dropout."""
    while isinstance(node, fx.Node) and node.op == "call_module":
        if node.target in names:
            return str(node.target)
        if not isinstance(modules[str(node.target)], _THROUGH):
            return None
        node = node.args[0] if node.args else None
    return None
