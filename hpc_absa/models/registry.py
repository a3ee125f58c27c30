"""Models by name: ours, torchvision's, and the user's as `"package.module:function"`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from hpc_absa import plugins
from hpc_absa.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

_DEPTHS = (8, 20, 32, 44, 56, 110)


def build(
    name: str, arguments: Mapping[str, Any], channels: int, image_size: int, classes: int
) -> nn.Module:
    """A model with fresh weights, which depend on torch's random state alone: seed it before.

    Args:
        name: One of `names()`, a classification model of torchvision's, or
            `"package.module:function"`, called with `arguments` and with those of `channels`,
            `image_size` and `classes` that its signature takes.
        arguments: The rest of the job's `[model]` table.
        channels: Of the input [b, C, H, W]; the number of features where inputs are vectors.
        image_size: H = W in pixels.
        classes: Outputs.

    Raises:
        UsageError: Unknown name (with those like it), or an argument that the model has not (with
            those it has).
    """
    from torch import nn

    offered = {"channels": channels, "image_size": image_size, "classes": classes}
    if plugins.is_reference(name):
        model = plugins.call(plugins.resolve(name, "model.name"), "model", arguments, offered, name)
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"model.name: {name} returned {type(model).__name__}, expected a torch.nn.Module"
            )
        return model
    builders = _builders()
    if name in builders:
        return plugins.call(builders[name], "model", arguments, offered, name)
    from hpc_absa.models import vision

    if name in vision.names():
        return vision.build(name, arguments, channels, classes)
    raise UsageError(
        f'model.name: no model "{name}"{plugins.suggestion(name, names())} Known are '
        f"{', '.join(builders)}, torchvision's classification models, and your own as "
        '"package.module:function"'
    )


def names() -> list[str]:
    """All models known by name: ours, then torchvision's."""
    from hpc_absa.models import vision

    ours = list(_builders())
    return ours + [name for name in vision.names() if name not in ours]


def _builders() -> dict[str, Callable[..., nn.Module]]:
    from hpc_absa.models import resnet, small, squeezenext

    return {
        "digits-cnn": small.digits_cnn,
        **{f"resnet{depth}": partial(resnet.resnet, depth) for depth in _DEPTHS},
        "resnet18-cifar": resnet.resnet18_cifar,
        "wideresnet": resnet.wideresnet,
        "squeezenext": squeezenext.squeezenext,
        "c1": small.c1,
    }
