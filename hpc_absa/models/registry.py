"""Models by name: built-in, torchvision's, and `"package.module:function"`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from hpc_absa import plugins
from hpc_absa.errors import UsageError
from hpc_absa.torchvision_import import torchvision

if TYPE_CHECKING:
    from torch import nn


def build(
    name: str,
    arguments: Mapping[str, Any],
    channels: int | None = None,
    image_size: int | None = None,
    classes: int | None = None,
) -> nn.Module:
    """A model with new weights, which depend on torch's random state alone: seed it before.

    Args:
        name: A built-in model, a classification model of torchvision's, or
            `"package.module:function"`, called with `arguments` and with those of `channels`,
            `image_size` and `classes` that its signature takes.
        arguments: The rest of the job's `[model]` table.
        channels: Of the input [b, C, H, W]; the number of features if inputs are vectors. None, as
            for the next two, if the data set has no such number.
        image_size: H = W in pixels.
        classes: Outputs.

    Raises:
        UsageError: Unknown name, or an argument that the model does not have.
    """
    known = {"channels": channels, "image_size": image_size, "classes": classes}
    offered = {name: number for name, number in known.items() if number is not None}
    if plugins.is_reference(name):
        from torch import nn

        model = plugins.call(plugins.resolve(name, "model.name"), "model", arguments, offered, name)
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"model.name: {name} returned {type(model).__name__}, expected a torch.nn.Module"
            )
        return model
    builtin = builtin_models()
    if name in builtin:
        with plugins.user_code(f"model.name = {name!r}"):
            return plugins.call(builtin[name], "model", arguments, offered, name)
    models = torchvision().models
    published = models.list_models(module=models)
    if name in published:
        return _torchvision_model(name, arguments, channels, classes)
    raise UsageError(
        f'model.name: no model "{name}"{plugins.suggestion(name, [*builtin, *published])} Known '
        f"are {', '.join(builtin)}, torchvision's classification models, and your own as "
        '"package.module:function"'
    )


def builtin_models() -> dict[str, Callable[..., nn.Module]]:
    from hpc_absa.models import resnet, small, squeezenext

    return {
        "digits-cnn": small.DigitsCNN,
        **{f"resnet{n}": partial(resnet.resnet, n) for n in (8, 20, 32, 44, 56, 110)},
        "resnet18-cifar": resnet.resnet18_cifar,
        "wideresnet": resnet.WideResNet,
        "squeezenext": squeezenext.SqueezeNext,
        "c1": small.C1,
    }


def _torchvision_model(
    name: str, arguments: Mapping[str, Any], channels: int | None, classes: int | None
) -> nn.Module:
    if channels not in (3, None):
        raise UsageError(
            f"model.name: torchvision's {name} takes images with 3 channels, the data set has "
            f"{channels}"
        )
    given = {"num_classes": classes, **arguments}
    if given["num_classes"] is None:
        raise UsageError(
            f"model.num_classes: {name} needs this argument, because the data set names no classes"
        )
    if name in ("googlenet", "inception_v3"):
        # Without the auxiliary classifiers, because a loss takes one output.
        given = {"aux_logits": False, "init_weights": True, **given}
    get_model = torchvision().models.get_model
    try:
        return get_model(name, weights=None, **given)
    except TypeError as error:
        import torch

        # The class has the arguments, the function `get_model` calls takes any.
        with torch.device("meta"):  # no memory, no random numbers
            model = get_model(name, weights=None)
        skipped = {"self", "num_classes", "block", "layers", "args", "kwargs"}
        valid = inspect.signature(type(model).__init__).parameters.keys() - skipped
        unknown = [key for key in arguments if key not in valid and key != "num_classes"]
        if not unknown:
            raise UsageError(f"model: {name} cannot be built: {error}") from error
        raise UsageError(
            f"model.{unknown[0]}: {name} has no such argument; {plugins.valid_ones(valid)}"
        ) from error
