"""SqueezeNext (Gholami et al. 2018, arXiv:1803.10615) for 32 × 32 images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hpc_absa.errors import UsageError
from hpc_absa.models.resnet import stages


class SqueezeNextBlock(nn.Module):
    """Figure 1 of the paper: two 1 × 1 that squeeze, a 3 × 1 and a 1 × 3, a 1 × 1 that expands.

    The channels are C → C/2 → C/4 → C/2 → C/2 → C; where the block halves the image, they are
    squeezed half as much.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, upright: bool) -> None:
        super().__init__()
        middle = inputs if stride > 1 else max(1, inputs // 2)
        first, second = ((3, 1), (1, 3)) if upright else ((1, 3), (3, 1))
        self.layers = nn.Sequential(
            *_convolution(inputs, middle, (1, 1), stride),
            *_convolution(middle, max(1, middle // 2), (1, 1)),
            *_convolution(max(1, middle // 2), middle, first),
            *_convolution(middle, middle, second),
            *_convolution(middle, outputs, (1, 1)),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = (
            nn.Identity() if same else nn.Sequential(*_convolution(inputs, outputs, (1, 1), stride))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.layers(x) + self.shortcut(x))


class SqueezeNext(nn.Module):
    """`widen`-SqNxt-23: a stem, four stages of blocks, a 1 × 1 bottleneck, a linear layer.

    The stem is 3 × 3 without stride in place of ImageNet's 7 × 7. `widen` multiplies the stages'
    32, 64, 128 and 256 channels (the paper: 0.5 to 2). The paper's variants are permutations of
    `blocks`, the number in each stage.
    """

    def __init__(
        self, channels: int, classes: int, widen: float = 1.0, blocks: Sequence[int] = (6, 6, 8, 1)
    ) -> None:
        if widen <= 0:
            raise UsageError(f"model.widen: {widen}, expected a positive number")
        if len(blocks) != 4 or not all(isinstance(count, int) and count > 0 for count in blocks):
            raise UsageError(f"model.blocks: {blocks}, expected 4 whole numbers from 1")
        super().__init__()
        widths = [max(4, round(widen * width)) for width in (32, 64, 128, 256)]
        stem = max(4, round(64 * widen))
        layers: list[nn.Module] = [*_convolution(channels, stem, (3, 3))]
        for inputs, width, stride, block in stages(stem, blocks, widths):
            # The order of 3 × 1 and 1 × 3 alternates.
            layers.append(SqueezeNextBlock(inputs, width, stride, upright=block % 2 == 0))
        layers += _convolution(widths[-1], widths[-1] // 2, (1, 1))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(widths[-1] // 2, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


def _convolution(
    inputs: int, outputs: int, kernel: tuple[int, int], stride: int = 1
) -> tuple[nn.Module, ...]:
    padding = (kernel[0] // 2, kernel[1] // 2)
    return (
        nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )
