"""Models and losses by name: built-in, torchvision's, and `"package.module:function"`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from hpc_absa import plugins
from hpc_absa.errors import UsageError
from hpc_absa.torchvision_import import torchvision

if TYPE_CHECKING:
    import torch
    from torch import nn

    Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def build(
    name: str, arguments: Mapping[str, Any], channels: int, image_size: int, classes: int
) -> nn.Module:
    """A model with new weights, which depend on torch's random state alone: seed it before.

    Args:
        name: A built-in model, a classification model of torchvision's, or
            `"package.module:function"`, called with `arguments` and with those of `channels`,
            `image_size` and `classes` that its signature takes.
        arguments: The rest of the job's `[model]` table.
        channels: Of the input [b, C, H, W]; the number of features if inputs are vectors.
        image_size: H = W in pixels.
        classes: Outputs.

    Raises:
        UsageError: Unknown name, or an argument that the model does not have.
    """
    offered = {"channels": channels, "image_size": image_size, "classes": classes}
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
    name: str, arguments: Mapping[str, Any], channels: int, classes: int
) -> nn.Module:
    if channels != 3:
        raise UsageError(
            f"model.name: torchvision's {name} takes images with 3 channels, the data set has "
            f"{channels}"
        )
    given = dict(arguments)
    if name in ("googlenet", "inception_v3"):
        # Without the auxiliary classifiers, because a loss takes one output.
        given = {"aux_logits": False, "init_weights": True, **given}
    get_model = torchvision().models.get_model
    try:
        return get_model(name, weights=None, num_classes=classes, **given)
    except TypeError as error:
        import torch

        # The class has the arguments, the function `get_model` calls takes any.
        with torch.device("meta"):  # no memory, no random numbers
            model = get_model(name, weights=None)
        skipped = {"self", "num_classes", "block", "layers", "args", "kwargs"}
        valid = inspect.signature(type(model).__init__).parameters.keys() - skipped
        unknown = [key for key in arguments if key not in valid]
        if not unknown:
            raise UsageError(f"model: {name} cannot be built: {error}") from error
        raise UsageError(
            f"model.{unknown[0]}: {name} has no such argument; {plugins.valid_ones(valid)}"
        ) from error


def build_loss(name: str, arguments: Mapping[str, Any] | None = None) -> Loss:
    """A loss: outputs [b, classes] and targets [b] → scalar, the mean over the samples.

    Args:
        name: `"cross_entropy"`, or `"package.module:name"`: a function called with outputs,
            targets and `arguments`, or a class such as `"torch.nn:MultiMarginLoss"`, created
            with `arguments` once.
        arguments: For `cross_entropy`: `label_smoothing`, from 0 to 1.

    Raises:
        UsageError: Unknown name, or arguments that the loss does not have.
    """
    given = dict(arguments or {})
    if plugins.is_reference(name):
        target = plugins.resolve(name, "loss.name")
        if inspect.isclass(target):
            return plugins.call(target, "loss", given, {})
        try:
            inspect.signature(target).bind(None, None, **given)
        except ValueError:  # some functions written in C have no signature
            pass
        except TypeError as error:
            raise UsageError(
                f"loss: {getattr(target, '__name__', target)} cannot be called with outputs, "
                f"targets and {list(given) or 'no arguments'}: {error}"
            ) from error
        return partial(target, **given)
    if name != "cross_entropy":
        raise UsageError(
            f'loss.name: no loss "{name}", expected "cross_entropy" or your own as '
            '"package.module:function"'
        )
    return plugins.call(_cross_entropy, "loss", given, {}, name)


def _cross_entropy(label_smoothing: float = 0.0) -> Loss:
    from torch.nn import functional

    if not 0.0 <= label_smoothing < 1.0:
        raise UsageError(f"loss.label_smoothing: {label_smoothing}, expected from 0 to below 1")
    return partial(functional.cross_entropy, label_smoothing=label_smoothing)
