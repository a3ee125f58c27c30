"""Residual networks for 32 × 32 images, and any other size.

He et al. 2016 (arXiv:1512.03385, section 4.2) for ResNet-8 … -110, its ImageNet sibling with a
3 × 3 stem for `resnet18-cifar`, and Zagoruyko and Komodakis 2016 (arXiv:1605.07146) for WideResNet.

Shapes: a network maps [b, C, H, W] to [b, classes], a block [b, inputs, H, W] to
[b, outputs, H/stride, W/stride].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional

from hpc_absa.errors import UsageError

Shortcut = Literal["pad", "convolution"]
"""Where a block changes the shape: zeros for the new channels (option A), or a 1 × 1 (option B)."""


class PaddedShortcut(nn.Module):
    """Every `stride`-th pixel, and zeros for the new channels: no weights."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (outputs - inputs) // 2
        self.after = outputs - inputs - self.before

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Pooling over one pixel selects as indexing would, but keeps channels_last.
        x = functional.avg_pool2d(x, kernel_size=1, stride=self.stride)
        return functional.pad(x, (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions and a shortcut around them."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module
        if stride == 1 and inputs == outputs:
            self.shortcut = nn.Identity()
        elif shortcut == "pad":
            self.shortcut = PaddedShortcut(inputs, outputs, stride)
        else:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PreactivatedBlock(nn.Module):
    """WideResNet's block: batch norm and ReLU before each convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = _conv3x3(outputs, outputs)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(x))
        # A convolution as shortcut starts from the activated input, as in the authors' code.
        kept = x if self.shortcut is None else self.shortcut(y)
        y = self.conv1(y)
        return kept + self.conv2(self.dropout(torch.relu(self.bn2(y))))


class ResNet(nn.Module):
    """A 3 × 3 stem, stages of basic blocks, and one linear layer."""

    def __init__(
        self,
        channels: int,
        classes: int,
        blocks: Sequence[int],
        widths: Sequence[int],
        shortcut: Shortcut,
    ) -> None:
        super().__init__()
        self.conv = _conv3x3(channels, widths[0])
        self.bn = nn.BatchNorm2d(widths[0])
        sizes = stages(widths[0], blocks, widths)
        self.blocks = nn.Sequential(*(BasicBlock(i, o, s, shortcut) for i, o, s, _ in sizes))
        self.classifier = nn.Linear(widths[-1], classes)
        _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks(torch.relu(self.bn(self.conv(x))))
        return self.classifier(x.mean(dim=(2, 3)))


def resnet(
    depth: int, channels: int, classes: int, widths: Sequence[int] = (16, 32, 64)
) -> nn.Module:
    """ResNet of He et al. 2016, section 4.2: `depth` = 6n + 2 layers with n blocks a stage."""
    _check_widths(widths, 3)
    return ResNet(channels, classes, [(depth - 2) // 6] * 3, widths, "pad")


def resnet18_cifar(
    channels: int, classes: int, widths: Sequence[int] = (64, 128, 256, 512)
) -> nn.Module:
    """The 18-layer ResNet with a 3 × 3 stem and no pooling, as is usual for 32 × 32 images."""
    _check_widths(widths, 4)
    return ResNet(channels, classes, [2] * 4, widths, "convolution")


class WideResNet(nn.Module):
    """WRN-`depth`-`widen`: 6n + 4 layers in three stages of 16, 32 and 64 · `widen` channels.

    `dropout` is a probability, between the two convolutions of a block.
    """

    def __init__(
        self, channels: int, classes: int, depth: int = 16, widen: int = 4, dropout: float = 0.0
    ) -> None:
        if not isinstance(depth, int) or depth < 10 or (depth - 4) % 6:
            raise UsageError(f"model.depth: {depth}, expected 6n + 4: 10, 16, 22, 28, 34, 40, ...")
        if not isinstance(widen, int) or widen < 1:
            raise UsageError(f"model.widen: {widen}, expected a whole number from 1")
        if not 0.0 <= dropout < 1.0:
            raise UsageError(f"model.dropout: {dropout}, expected a probability below 1")
        super().__init__()
        blocks, widths = [(depth - 4) // 6] * 3, [widen * width for width in (16, 32, 64)]
        self.conv = _conv3x3(channels, 16)
        sizes = stages(16, blocks, widths)
        self.blocks = nn.Sequential(*(PreactivatedBlock(i, o, s, dropout) for i, o, s, _ in sizes))
        self.bn = nn.BatchNorm2d(widths[-1])
        self.classifier = nn.Linear(widths[-1], classes)
        _initialise(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.blocks(self.conv(x))))
        return self.classifier(x.mean(dim=(2, 3)))


def stages(
    inputs: int, blocks: Sequence[int], widths: Sequence[int]
) -> Iterator[tuple[int, int, int, int]]:
    """Each block's input channels, output channels, stride, and index within its stage.

    Each stage but the first begins by halving the size.
    """
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        for block in range(count):
            yield inputs, width, 2 if stage > 0 and block == 0 else 1, block
            inputs = width


def _initialise(model: nn.Module) -> None:
    """He et al. 2015 for convolutions, by their outputs; torch's default for other layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _check_widths(widths: Sequence[int], count: int) -> None:
    good = isinstance(widths, list | tuple) and len(widths) == count
    if not good or not all(isinstance(width, int) and width > 0 for width in widths):
        raise UsageError(f"model.widths: {widths}, expected {count} whole numbers from 1")
    if sorted(widths) != list(widths):
        raise UsageError(f"model.widths: {widths}, expected none smaller than the one before it")
