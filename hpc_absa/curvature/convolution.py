"""Convolution whose double backward is three library calls instead of autograd's generic formula.

`_ConvolutionGradient` is marked as once differentiable: there is no third derivative.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Geometry(NamedTuple):
    """A convolution without its tensors."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """`x ∗ w + b`."""
        zeros = [0] * len(self.stride)
        return torch.convolution(
            x, w, b, self.stride, self.padding, self.dilation, False, zeros, self.groups
        )

    def backward(
        self, gy: Tensor, x: Tensor, w: Tensor, mask: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Gradients by x, w and b where `mask` is True: one library call each."""
        zeros = [0] * len(self.stride)
        return torch.ops.aten.convolution_backward.default(
            gy, x, w, [w.shape[0]], self.stride, self.padding, self.dilation, False, zeros,
            self.groups, mask,
        )  # fmt: skip


class Convolution(torch.autograd.Function):
    """`y = x ∗ w + b`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry, ctx.has_bias = geometry, b is not None
        return geometry.forward(x, w, b)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        mask = (need_x, need_w, need_b and ctx.has_bias)
        return *_ConvolutionGradient.apply(gy, x, w, ctx.geometry, mask), None


class _ConvolutionGradient(torch.autograd.Function):
    """`(gy, x, w) ↦ (gx, gw, gb)`; its derivative is a convolution and two gradients of one."""

    @staticmethod
    def forward(
        ctx: Any, gy: Tensor, x: Tensor, w: Tensor, geometry: Geometry, mask: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(gy, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return geometry.backward(gy, x, w, mask)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, ggx: Tensor | None, ggw: Tensor | None, ggb: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """With ggx, ggw, ggb the gradients by gx, gw, gb.

        By gy: `ggx ∗ w + x ∗ ggw + ggb`; by x: the input gradient of (gy, ggw);
        by w: the weight gradient of (gy, ggx).
        """
        gy, x, w = ctx.saved_tensors
        need_gy, need_x, need_w = ctx.needs_input_grad[:3]
        by_gy = _gradient_by_gy(ctx.geometry, gy, x, w, ggx, ggw, ggb) if need_gy else None
        mask = (need_x and ggw is not None, need_w and ggx is not None, False)
        by_x = by_w = None
        if mask[0] or mask[1]:
            last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
            memory_format = torch.channels_last if last else torch.contiguous_format
            gi = x if ggx is None else ggx.contiguous(memory_format=memory_format)
            gk = w if ggw is None else ggw
            by_x, by_w, _ = ctx.geometry.backward(gy, gi, gk, mask)
        return by_gy, by_x, by_w, None, None


def _gradient_by_gy(
    geometry: Geometry,
    gy: Tensor,
    x: Tensor,
    w: Tensor,
    ggx: Tensor | None,
    ggw: Tensor | None,
    ggb: Tensor | None,
) -> Tensor | None:
    if ggx is not None and ggw is not None and geometry.groups == 1:
        # Both terms as one convolution of twice the channels.
        return geometry.forward(torch.cat([ggx, x], 1), torch.cat([w, ggw], 1), ggb)
    total = None
    if ggw is not None:
        total = geometry.forward(x, ggw, ggb)
    elif ggb is not None:
        total = ggb.view(1, -1, *[1] * len(geometry.stride)).expand_as(gy)
    if ggx is not None:
        term = geometry.forward(ggx, w, None)
        total = term if total is None else term + total
    return total
