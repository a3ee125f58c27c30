"""Convolution whose double backward is three library calls, not autograd's generic formula."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_aten_backward = torch.ops.aten.convolution_backward.default


@dataclass(frozen=True)
class Geometry:
    """Everything about a convolution but its tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """`x ∗ w + b`."""
        dims = [0] * len(self.stride)
        return torch.convolution(
            x, w, b, self.stride, self.padding, self.dilation, False, dims, self.groups
        )

    def backward(
        self, gy: Tensor, x: Tensor, w: Tensor, mask: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients by input, weight and bias: one library call each that `mask` asks for."""
        dims = [0] * len(self.stride)
        return _aten_backward(
            gy, x, w, [w.shape[0]], self.stride, self.padding, self.dilation, False, dims,
            self.groups, mask,
        )  # fmt: skip


class Convolution(torch.autograd.Function):
    """`y = x ∗ w + b`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
        """One convolution."""
        ctx.save_for_backward(x, w)
        ctx.geometry, ctx.has_bias = geometry, b is not None
        return geometry.forward(x, w, b)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients as a function that can be differentiated again."""
        x, w = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        mask = (need_x, need_w, need_b and ctx.has_bias)
        return *ConvolutionGradient.apply(gy, x, w, ctx.geometry, mask), None


class ConvolutionGradient(torch.autograd.Function):
    """`(gy, x, w) ↦ (gx, gw, gb)`; its derivative is two convolutions and two gradients of one."""

    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, mask: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """The library's own backward."""
        ctx.save_for_backward(gy, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return geometry.backward(gy, x, w, mask)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, ggx: Tensor | None, ggw: Tensor | None, ggb: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """With h the gradient by (gx, gw, gb).

        by gy: `ggx ∗ w + x ∗ ggw + ggb`; by x: the input gradient of (gy, ggw);
        by w: the weight gradient of (gy, ggx).
        """
        gy, x, w = ctx.saved_tensors
        need_gy, need_x, need_w = ctx.needs_input_grad[:3]
        by_gy = _by_output(ctx.geometry, gy, x, w, ggx, ggw, ggb) if need_gy else None
        mask = (need_x and ggw is not None, need_w and ggx is not None, False)
        by_x = by_w = None
        if mask[0] or mask[1]:
            gi = x if ggx is None else ggx.contiguous(memory_format=_format(x))
            gk = w if ggw is None else ggw
            by_x, by_w, _ = ctx.geometry.backward(gy, gi, gk, mask)
        return by_gy, by_x, by_w, None, None


def _by_output(
    geometry: Geometry,
    gy: Tensor,
    x: Tensor,
    w: Tensor,
    ggx: Tensor | None,
    ggw: Tensor | None,
    ggb: Tensor | None,
) -> Tensor | None:
    if ggx is not None and ggw is not None and geometry.groups == 1:
        both = torch.cat([ggx, x], 1), torch.cat([w, ggw], 1)
        return geometry.forward(*both, ggb)
    result = None
    if ggw is not None:
        result = geometry.forward(x, ggw, ggb)
    elif ggb is not None:
        result = ggb.view(1, -1, *[1] * len(geometry.stride)).expand_as(gy)
    if ggx is not None:
        other = geometry.forward(ggx, w, None)
        result = other if result is None else other + result
    return result


def _format(x: Tensor) -> torch.memory_format:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def convolve(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`F.conv1d`, `F.conv2d`, `F.conv3d` with the cheap second derivative."""
    n = w.dim() - 2
    geometry = Geometry(_tuple(stride, n), _tuple(padding, n), _tuple(dilation, n), groups)
    return Convolution.apply(x, w, b, geometry)


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values
