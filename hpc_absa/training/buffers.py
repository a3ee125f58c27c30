"""Buffers of a model that are equal on all ranks and at any number of ranks.

A forward pass changes buffers: running statistics of normalizations, vectors of spectral norm,
moving averages, counters. PyTorch's own update puts each rank's microbatches into that rank's
buffers, so that ranks drift apart and the result depends on their number. Here every microbatch of
a step starts from the values that the buffers had before the step, and after the step they have

- floating-point buffers: the mean over the step's microbatches of what each one left there,
- integers and flags: the same mean, rounded away from the value before the step.

With one microbatch per step this is PyTorch's own result. For the running statistics of batch norm
it is `running ← (1 − m)·running + m·mean`, with the momentum m and the mean of the statistics of
the microbatches. A layer that a forward pass calls twice updates twice; one that it does not call,
or that is in evaluation mode, does not. Forward passes outside of `collecting` leave no trace:
evaluation, adversarial examples, and what activation checkpointing computes again in the backward
pass. A buffer whose shape changes (a cache that grows) is left as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.hooks import RemovableHandle

ALWAYS_COMPARED = 1 << 16
"""Elements up to which a buffer is compared by value after each forward pass. Of larger ones only
the first pass is compared, then PyTorch's count of their changes, which `.data` circumvents."""

Values = dict[int, Tensor]
"""Sums of the values of changed buffers, float64, by their index."""


@dataclass
class Buffer:
    """A buffer without a special rule, which may be registered in several places."""

    places: list[tuple[nn.Module, str]]
    current: Tensor
    start: Tensor
    """A copy of its value before the step."""
    version: int

    def value(self) -> Tensor:
        module, name = self.places[0]
        tensor: Tensor = getattr(module, name)
        return tensor.detach()

    def changed(self, by_value: bool) -> bool:
        module, name = self.places[0]
        now = getattr(module, name)
        if now is not self.current or _version(now) != self.version:
            return True
        return by_value and not torch.equal(now, self.start)

    def set(self, value: Tensor) -> None:
        """Replace the tensor: the graph of a forward pass may need the old one."""
        self.current = value
        for module, name in self.places:
            setattr(module, name, value)
        self.version = _version(value)


@dataclass
class Layer:
    """A normalization with PyTorch's own forward pass, whose statistics are averaged."""

    module: Any
    statistics: tuple[Tensor, ...]
    """Mean and variance of this microbatch: `Σᵢ (1 − m)^(c−1−i) sᵢ` over its c calls."""
    others: tuple[Tensor, ...]
    """Likewise, for those of other calls."""
    saved: tuple[Any, ...] | None = None
    """Its buffers and momentum during a call in training mode."""
    weight: float = 0.0
    """`Σᵢ (1 − m)^i`, the weight of `statistics` in units of m."""
    calls: int = 0
    buffers: dict[str, Tensor] = field(default_factory=dict)
    """The parts of the flat tensors that are its module's buffers."""


@dataclass
class Collected:
    """What a group of microbatches of one rank changed; sums over them."""

    flat: Tensor
    """[size], added up over all microbatches with the gradients."""
    values: Values = field(default_factory=dict)


def _unrelated(mean_and_variance: Tensor) -> tuple[Tensor, ...]:
    """Parts of a tensor that autograd takes for tensors of their own.

    It may have saved one of them, which another one's change must not invalidate.
    """
    return tuple(part.data for part in mean_and_variance.chunk(2))


class ModelBuffers:
    """The buffers of `model`, which must be on its device and have its initial values.

    Normalizations with float32 statistics keep them in one flat tensor, and hooks collect the
    statistics of each call. All other buffers are compared before and after a forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._device = next(model.parameters()).device
        modules = _standard_layers(model)
        sizes = [2 * module.num_features for module in modules]
        self._running = torch.zeros(sum(sizes), dtype=torch.float32, device=self._device)
        self._statistics, others = torch.zeros_like(self._running), torch.zeros_like(self._running)
        self._layers = [
            Layer(module, _unrelated(mean_and_variance), _unrelated(other))
            for module, mean_and_variance, other in zip(
                modules, self._statistics.split(sizes), others.split(sizes), strict=True
            )
        ]
        self._handles: list[RemovableHandle] = []
        self._layer_of = torch.arange(len(sizes), device=self._device).repeat_interleave(
            torch.tensor(sizes, dtype=torch.int64, device=self._device)
        )
        """Of each element of `_running`."""
        self._counters = torch.zeros(len(self._layers), dtype=torch.int64, device=self._device)
        self._constant = lru_cache(8)(
            partial(torch.tensor, dtype=torch.float32, device=self._device)
        )
        """Numbers as a tensor: usually the same ones in each step."""
        self._collecting = False
        self._adopt_layers(sizes)
        self._others = self._other_buffers()
        self._compare_all = True
        self.size = self._running.numel() + 2 * len(self._layers) + len(self._others)
        """Values that a step sums with its gradients."""

    @contextmanager
    def collecting(self, collected: Collected) -> Iterator[None]:
        """Within, one training forward pass adds its microbatch's changes to `collected`."""
        self.restore()
        for layer in self._layers:
            layer.weight, layer.calls = 0.0, 0
        self._statistics.data.zero_()  # `.data`: autograd has saved them, without using them
        self._collecting = True
        try:
            yield
        finally:
            self._collecting = False
        self._add_layers(collected.flat)
        self._add_others(collected)

    def restore(self) -> None:
        """Undo what forward passes outside of `collecting` changed."""
        self._hold_buffers()
        for buffer in self._changed():
            if buffer.value().shape == buffer.start.shape:
                buffer.set(buffer.start.clone())
            else:
                self._accept(buffer)

    def changed(self, total: Tensor) -> list[int]:
        """Indices of the buffers whose values `update` needs, from the sums of all ranks."""
        if not self._others:
            return []
        counts = total[-len(self._others) :].tolist()
        return [index for index, count in enumerate(counts) if count]

    def values(self, collected: Collected, changed: list[int]) -> Tensor:
        """The sums of the values of these buffers as one flat tensor, float64."""
        return torch.cat(
            [
                collected.values[index]
                if index in collected.values
                else torch.zeros_like(_as_float64(self._others[index].start))
                for index in changed
            ]
        )

    def update(
        self, total: Tensor, microbatches: int, changed: list[int], values: Tensor | None
    ) -> None:
        """Set the buffers once, after a step.

        Args:
            total: [size], the sum over all microbatches of a step, all ranks together.
            microbatches: how many they were.
            changed: indices of changed buffers.
            values: the sum of their `values` over all ranks.
        """
        self.restore()
        if self._layers:
            self._update_layers(total, microbatches)
        if values is None:
            return
        counts = total[-len(self._others) :].tolist()
        starts = [_as_float64(self._others[index].start) for index in changed]
        parts = values.split([len(start) for start in starts])
        for index, start, part in zip(changed, starts, parts, strict=True):
            unchanged = microbatches - round(counts[index])
            mean = (part + unchanged * start if unchanged else part) / microbatches
            buffer = self._others[index]
            buffer.start = _from_float64(mean, start, buffer.start)
            buffer.set(buffer.start.clone())

    def close(self) -> None:
        """Let forward passes update the buffers as PyTorch does."""
        for handle in self._handles:
            handle.remove()

    # Normalizations

    def _adopt_layers(self, sizes: list[int]) -> None:
        """Make parts of the flat tensors the layers' buffers, and register the hooks."""
        for index, (layer, pair) in enumerate(
            zip(self._layers, self._running.split(sizes), strict=True)
        ):
            module, (mean, variance) = layer.module, pair.chunk(2)
            layer.buffers = {"running_mean": mean, "running_var": variance}
            if module._buffers.get("num_batches_tracked") is not None:
                layer.buffers["num_batches_tracked"] = self._counters[index]
            self._handles += [
                module.register_forward_pre_hook(self._before_call(layer)),
                module.register_forward_hook(self._after_call(layer), always_call=True),
            ]
        self._hold_buffers()

    def _hold_buffers(self) -> None:
        """Others come into their place also where a script moves the model away and back."""
        for layer in self._layers:
            present = layer.module._buffers
            for name, own in layer.buffers.items():
                if present[name] is not own:
                    own.copy_(present[name])
                    present[name] = own

    def _before_call(self, layer: Layer) -> Any:
        scratch = torch.zeros((), dtype=torch.int64, device=self._device)

        def before(module: Any, inputs: Any) -> None:
            if not module.training or module is not layer.module:  # a copy has the hooks as well
                return
            buffers = module._buffers
            layer.saved = (dict(buffers), module.momentum)
            statistics = layer.statistics
            if layer.weight or not self._collecting:
                statistics = layer.others
                for tensor in statistics:
                    tensor.data.zero_()  # 0 times infinity would be NaN
            buffers["running_mean"], buffers["running_var"] = statistics
            if buffers.get("num_batches_tracked") is not None:
                buffers["num_batches_tracked"] = scratch
            # The buffers become the statistics of this call; nn.Module's setattr takes 10 µs.
            vars(module)["momentum"] = 1.0

        return before

    def _after_call(self, layer: Layer) -> Any:
        def after(module: Any, inputs: Any, outputs: Any) -> None:
            if layer.saved is None or module is not layer.module:
                return
            saved, vars(module)["momentum"] = layer.saved
            module._buffers.update(saved)
            layer.saved = None
            if not self._collecting:
                return
            layer.calls += isinstance(module, _BatchNorm)  # instance norm does not count
            kept = 1.0 if module.momentum is None else 1.0 - module.momentum
            if layer.weight:
                for sums, statistics in zip(layer.statistics, layer.others, strict=True):
                    sums.data.mul_(kept).add_(statistics)
            layer.weight = 1.0 + kept * layer.weight

        return after

    def _add_layers(self, flat: Tensor) -> None:
        if not self._layers:
            return
        for index, layer in enumerate(self._layers):
            if layer.weight and layer.module.momentum is None:
                calls = int(self._counters[index]) + layer.calls  # the mean over all of them
                layer.weight /= calls
                for sums in layer.statistics:
                    sums.data.div_(calls)
        size = self._running.numel()
        flat[:size] += self._statistics
        numbers = [layer.weight for layer in self._layers] + [layer.calls for layer in self._layers]
        flat[size : size + len(numbers)] += self._constant(tuple(numbers))

    def _update_layers(self, total: Tensor, microbatches: int) -> None:
        size, count = self._running.numel(), len(self._layers)
        means = total[: size + 2 * count].to(self._running.dtype) / microbatches
        weights, calls = means[size : size + count], means[size + count :]
        # with `momentum=None` it is in the weight
        momenta = (1.0 if (m := layer.module.momentum) is None else m for layer in self._layers)
        weight, momentum = weights[self._layer_of], self._constant(tuple(momenta))[self._layer_of]
        updated = self._running.lerp(means[:size] / weight, momentum * weight)
        self._running.copy_(torch.where(weight > 0, updated, self._running))
        self._counters += calls.ceil().to(torch.int64)

    # Other buffers

    def _other_buffers(self) -> list[Buffer]:
        layers = {id(layer.module) for layer in self._layers}
        places: dict[int, list[tuple[nn.Module, str]]] = {}
        tensors: dict[int, Tensor] = {}
        for module in self.model.modules():
            if id(module) in layers:
                continue
            for name, tensor in module.named_buffers(recurse=False, remove_duplicate=False):
                places.setdefault(id(tensor), []).append((module, name))
                tensors[id(tensor)] = tensor
        return [
            Buffer(places[key], tensor, tensor.detach().clone(), _version(tensor))
            for key, tensor in tensors.items()
        ]

    def _changed(self) -> Iterator[Buffer]:
        for buffer in self._others:
            by_value = self._compare_all or buffer.start.numel() <= ALWAYS_COMPARED
            if buffer.changed(by_value):
                yield buffer

    def _add_others(self, collected: Collected) -> None:
        counts = collected.flat[len(collected.flat) - len(self._others) :]
        indices = {id(buffer): index for index, buffer in enumerate(self._others)}
        for buffer in self._changed():
            index, value = indices[id(buffer)], buffer.value()
            if value.shape != buffer.start.shape:
                self._accept(buffer)
                continue
            value = _as_float64(value)
            known = collected.values.get(index)
            collected.values[index] = value if known is None else known + value
            counts[index] += 1
            buffer.set(buffer.start.clone())
        self._compare_all = False

    def _accept(self, buffer: Buffer) -> None:
        value = buffer.value()
        buffer.current = getattr(*buffer.places[0])
        buffer.version = _version(buffer.current)
        buffer.start = value.clone()


def _standard_layers(model: nn.Module) -> list[Any]:
    """Normalizations whose forward pass is PyTorch's own and whose statistics are float32."""
    compiled = {
        id(inner)
        for module in model.modules()
        if type(module).__name__ == "OptimizedModule"
        or getattr(module, "_compiled_call_impl", None) is not None
        for inner in module.modules()
    }
    owners = Counter(
        id(tensor)
        for module in model.modules()
        for _, tensor in module.named_buffers(recurse=False, remove_duplicate=False)
    )
    return [
        module
        for module in model.modules()
        if isinstance(module, _NormBase)
        and type(module).forward in (_BatchNorm.forward, _InstanceNorm.forward)
        and "forward" not in vars(module)
        and id(module) not in compiled
        and not (isinstance(module, _InstanceNorm) and module.momentum is None)
        and all(
            tensor is not None and tensor.dtype == torch.float32 and owners[id(tensor)] == 1
            for tensor in (module.running_mean, module.running_var)
        )
    ]


def _version(tensor: Tensor) -> int:
    """How often the tensor was changed, but by `.data`; not counted for inference tensors."""
    return -1 if tensor.is_inference() else tensor._version


def _as_float64(tensor: Tensor) -> Tensor:
    """A flat copy; sums of equal numbers in it are exact."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.detach().to(torch.float64, copy=True).reshape(-1)


def _from_float64(mean: Tensor, start: Tensor, like: Tensor) -> Tensor:
    if like.is_complex():
        return torch.view_as_complex(mean.view(*like.shape, 2)).to(like.dtype)
    if not like.is_floating_point():
        difference = mean - start
        mean = start + difference.sign() * difference.abs().ceil()
    return mean.view(like.shape).to(like.dtype)
