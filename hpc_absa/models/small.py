"""Small networks for small images: digits on one core, and the ABSA authors' C1.

Shapes: [b, C, H, W] → [b, classes].
"""

from __future__ import annotations

import torch
from torch import nn

from hpc_absa.errors import UsageError


class DigitsCNN(nn.Module):
    """Three convolutions with batch norm, averaged over the image, and one linear layer.

    SiLU and not ReLU, so that the loss has a Hessian everywhere. Some 24,000 weights at `width` 16,
    for images of 4 × 4 pixels or more. `width` is the number of channels of the first convolution;
    the others have two and four times as many.
    """

    def __init__(self, channels: int, classes: int, width: int = 16) -> None:
        if width < 1:
            raise UsageError(f"model.width: {width}, expected 1 or more")
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(channels, width),
            *_convolution(width, 2 * width, stride=2),
            *_convolution(2 * width, 4 * width),
        )
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x).mean(dim=(2, 3)))


class C1(nn.Module):
    """C1 of the ABSA study (arXiv:1802.08241, table 6; ReLU before batch norm as in its code).

    Conv(5, 5, 64) – pool(3) – Conv(5, 5, 64) – pool(3) – 384 – 192 – classes.
    """

    def __init__(self, channels: int, image_size: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (channels, 64):
            layers += [nn.Conv2d(inputs, 64, kernel_size=5, padding=2), nn.ReLU()]
            layers += [nn.BatchNorm2d(64), nn.MaxPool2d(3, stride=2, padding=1)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        side = (image_size + 3) // 4  # two poolings, each rounding up
        hidden = [nn.Linear(64 * side * side, 384), nn.ReLU(), nn.Linear(384, 192), nn.ReLU()]
        self.classifier = nn.Sequential(*hidden, nn.Linear(192, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x))


def _convolution(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.SiLU(),
    )
