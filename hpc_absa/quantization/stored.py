"""A quantized network as a file, and as a model that job files can name.

The file is an `.npz`: the folded network's weights by name, and a description in JSON of the model
it was traced from, of the bits, and of the ranges of activations. A job trains it further with

    [model]
    name = "hpc_absa.quantization.stored:network"
    file = "quantized.npz"
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpc_absa.checkpoint import Content, Group
from hpc_absa.errors import UsageError
from hpc_absa.models import build
from hpc_absa.models.weights import Arrays, read_weights
from hpc_absa.quantization import fake
from hpc_absa.quantization.fake import Range, Ranges
from hpc_absa.quantization.graph import Network, trace
from hpc_absa.rundir.files import replacing

REFERENCE = "hpc_absa.quantization.stored:network"
FORMAT = "hpc-absa-quantized"
_DESCRIPTION = "description"


def save(
    path: Path,
    network: Network,
    bits: Mapping[str, int],
    ranges: Ranges,
    model: Mapping[str, Any],
    shape: tuple[int, ...],
    classes: int,
) -> None:
    """Write the file.

    Args:
        path: ends in `.npz`.
        network: the float model.
        bits: by layer.
        ranges: of the inputs, by layer and bits.
        model: `name` and `arguments` of the model it was traced from.
        shape: of one input.
        classes: of the data set; 0 for data without.
    """
    description = {
        "model": dict(model),
        "shape": list(shape),
        "classes": classes,
        "bits": dict(bits),
        "ranges": {name: asdict(ranges[name][number]) for name, number in bits.items()},
    }
    state = network.folded.state_dict().items()
    text = json.dumps({"format": FORMAT, **description}).encode()
    arrays: dict[str, Any] = {_DESCRIPTION: np.frombuffer(text, np.uint8)}
    arrays |= {name: tensor.detach().cpu().numpy() for name, tensor in state}
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def digest_of(arrays: Arrays) -> str:
    """Of the content of a file that `save` wrote."""
    return Content({}, {"model": Group(arrays=arrays)}).digest()


def network(file: str, digest: str = "") -> nn.Module:
    """The fake-quantized network in a file that `save` wrote, for `model.name`.

    Args:
        file: that `save` wrote.
        digest: of its content, so that a run is not continued with another network; "" for any.

    Raises:
        UsageError: it is no such file, or has another network.
    """
    arrays = read_weights(Path(file))
    if digest and digest != (found := digest_of(arrays)):
        raise UsageError(f"{file}: another network: its digest is {found}, expected {digest}")
    try:
        description = json.loads(arrays.pop(_DESCRIPTION).tobytes())
        name, arguments = description["model"]["name"], description["model"]["arguments"]
        shape, bits = tuple(description["shape"]), description["bits"]
        ranges = {n: {bits[n]: Range(**found)} for n, found in description["ranges"].items()}
        classes = int(description["classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{file}: expected a quantized network that `hpc-absa quantize --out` wrote "
            f"({type(error).__name__}: {error})"
        ) from None
    size = shape[1] if len(shape) > 1 else 1
    model = build(name, arguments, shape[0], size, classes or None)
    traced = trace(model, torch.zeros(1, *shape))
    state = {key: torch.from_numpy(array) for key, array in arrays.items()}
    traced.folded.load_state_dict(state)
    return fake.quantized(traced, bits, ranges)
