"""Nested values of tensors, numbers and strings as arrays and JSON, without pickle.

`encode` puts tensors into a dictionary by name and returns the rest as JSON, which refers to them:

| value | JSON |
| --- | --- |
| None, bool, int, float, str | itself |
| list | an array |
| tuple | `{"tuple": [...]}` |
| dict | `{"dict": [[key, value], ...]}`, also of `OrderedDict` and of a module's `state_dict` |
| `collections.Counter` | `{"counter": [[key, value], ...]}` |
| tensor | `{"tensor": NAME, "dtype": "float32", "device": "cpu"}` |
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpc_absa.errors import UsageError

Tensors = dict[str, Tensor]

PLAIN = (bool, int, float, str, type(None))


def encode(value: Any, name: str, tensors: Tensors, place: str) -> Any:
    """`value` as JSON values; its tensors are added to `tensors` under names from `name` on.

    Raises:
        UsageError: something else is in it; the line begins with `place` and its keys.
    """
    if type(value) in PLAIN:
        return value
    if isinstance(value, Tensor):
        return _encode_tensor(value, name, tensors, place)
    if type(value) in (list, tuple):
        items = [
            encode(item, f"{name}.{index}", tensors, f"{place}[{index}]")
            for index, item in enumerate(value)
        ]
        return items if type(value) is list else {"tuple": items}
    if isinstance(value, Mapping):
        pairs = [
            [_key(key, place), encode(item, f"{name}.{key}", tensors, f"{place}[{key!r}]")]
            for key, item in value.items()
        ]
        return {"counter" if isinstance(value, Counter) else "dict": pairs}
    raise UsageError(
        f"{place} is of type {type(value).__name__}: checkpoints contain tensors, numbers, strings "
        "and None, and lists, tuples and dictionaries of them"
    )


def _encode_tensor(value: Tensor, name: str, tensors: Tensors, place: str) -> Any:
    if value.is_sparse or value.is_quantized or value.layout != torch.strided:
        raise UsageError(f"{place} is a {value.layout} tensor: expected a dense one")
    name = name.replace("/", ".")  # HDF5 would make groups of it
    while name in tensors:
        name += "_"
    tensors[name] = value.detach()
    dtype = str(value.dtype).removeprefix("torch.")
    return {"tensor": name, "dtype": dtype, "device": value.device.type}


def _key(key: Any, place: str) -> Any:
    if type(key) not in PLAIN:
        raise UsageError(
            f"{place} has the key {key!r} of type {type(key).__name__}: expected a string or number"
        )
    return key


def decode(node: Any, tensor: Callable[[Mapping[str, Any]], Tensor]) -> Any:
    """The value that `encode` made `node` of; `tensor` gives the tensor of a node of that kind."""
    if isinstance(node, list):
        return [decode(item, tensor) for item in node]
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        return tensor(node)
    if "tuple" in node:
        return tuple(decode(item, tensor) for item in node["tuple"])
    [(kind, pairs)] = node.items()
    decoded = {key: decode(item, tensor) for key, item in pairs}
    return Counter(decoded) if kind == "counter" else decoded


def to_tensor(node: Any) -> Tensor:
    """JSON as the bytes of a tensor, since an attribute of HDF5 has at most 64 KiB."""
    return torch.frombuffer(bytearray(json.dumps(node), "utf-8"), dtype=torch.uint8)


def from_array(array: np.ndarray) -> Any:
    """The JSON that `to_tensor` was given."""
    return json.loads(array.tobytes())


def saved_tensor(node: Mapping[str, Any], array: np.ndarray) -> Tensor:
    """A saved array with the type that it had as a tensor, on the CPU; it shares the memory."""
    saved = torch.from_numpy(array)
    dtype: torch.dtype = getattr(torch, node["dtype"])
    return saved.view(dtype) if dtype == torch.bfloat16 else saved
