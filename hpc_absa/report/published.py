"""Published results: the slides on ABSA and arXiv:1810.01021."""

from __future__ import annotations

from collections.abc import Mapping

SCHEDULE_NAMES = {
    "bl": "BL",
    "fb": "FB",
    "gg": "GG",
    "abs": "ABS",
    "absa": "ABSA",
    "absa-tuned": "ABSA tuned",
    "gns": "GNS",
    "norm-test": "norm test",
    "seesaw": "Seesaw",
    "steps": "steps",
    "random": "random",
}
"""Schedules in the order and with the names of the talk's tables."""

PUBLISHED_ACCURACY: Mapping[int, Mapping[str, tuple[float, int]]] = {
    128: {"bl": (83.05, 35156)},
    640: {
        "bl": (81.01, 7031),
        "fb": (84.59, 7031),
        "gg": (83.99, 16380),
        "abs": (83.30, 10578),
        "absa": (84.52, 9631),
    },
    3200: {
        "bl": (74.54, 1406),
        "fb": (78.70, 1406),
        "gg": (84.27, 14508),
        "abs": (83.33, 6375),
        "absa": (84.42, 5168),
    },
    5120: {
        "bl": (70.64, 878),
        "fb": (74.65, 878),
        "gg": (83.47, 14449),
        "abs": (83.83, 6575),
        "absa": (85.01, 6265),
    },
    10240: {
        "bl": (68.75, 439),
        "fb": (30.99, 439),
        "gg": (83.68, 14400),
        "abs": (83.56, 5709),
        "absa": (84.29, 7491),
    },
    16000: {
        "bl": (67.88, 281),
        "fb": (10.00, 281),
        "gg": (84.00, 14383),
        "abs": (83.50, 5739),
        "absa": (84.24, 5357),
    },
}
"""ResNet-18 on CIFAR-10: accuracy in percent, SGD iterations; by (maximum) batch and schedule."""

PUBLISHED_IMAGENET: Mapping[str, tuple[float | None, int]] = {
    "bl": (70.4, 450_000),
    "gg": (None, 166_000),
    "absa": (70.2, 66_000),
}
"""ResNet-18 on ImageNet: accuracy in percent, SGD iterations; by schedule."""

PUBLISHED_TIMES: Mapping[str, Mapping[str, float]] = {
    "bl": {"comp": 125073},
    "gg": {"comp": 50965, "comm": 54, "resize": 40},
    "absa": {"comp": 26404, "comm": 230, "resize": 95, "hessian": 2746},
    "absa-tuned": {"comp": 13935, "comm": 58, "resize": 39, "hessian": 220},
}
"""ResNet-18 on ImageNet: seconds by schedule."""


def published_table(data: str, model: str, base_batch: int) -> str:
    """Which of the talk's tables is about a job: `accuracy`, `time`, or "" for none."""
    match data, model, base_batch:
        case "cifar10", "resnet18" | "resnet18-cifar", 128:
            return "accuracy"
        case "imagenet", "resnet18", 256:
            return "time"
        case _:
            return ""
