"""Weights as arrays by name, in the files of other programs; no code in a file is executed."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpc_absa.errors import UsageError, first_line
from hpc_absa.rundir.files import replacing

Arrays = dict[str, NDArray[Any]]

SAFETENSORS_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
    "I16": "<i2", "I8": "<i1", "U8": "<u1", "BOOL": "?",
}  # fmt: skip

_HEADER_LIMIT = 100 << 20  # as in the reference implementation
_PREFIX = "module."
"""What `DataParallel` puts before every name."""


def read_weights(path: Path) -> Arrays:
    """The arrays of an `.npz`, `.safetensors`, `.pt` or `.pth` file, by PyTorch's names.

    A `.pt` file is read with `weights_only`, and may have the state_dict under `state_dict` or
    `model`. bfloat16 becomes float32.

    Raises:
        UsageError: no such file, another format, damaged, or it needs code to be loaded.
    """
    readers = {".npz": _npz, ".safetensors": _safetensors, ".pt": _torch, ".pth": _torch}
    if path.suffix not in readers:
        raise UsageError(f"{path}: expected a file of weights, {', '.join(readers)}")
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    arrays = readers[path.suffix](path)
    if arrays and all(name.startswith(_PREFIX) for name in arrays):
        arrays = {name.removeprefix(_PREFIX): array for name, array in arrays.items()}
    return arrays


def _npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path}: cannot be read as .npz: {first_line(error)}") from None


def _safetensors(path: Path) -> Arrays:
    """A length, a header in JSON, and the bytes of all tensors (github.com/huggingface/safetensors,
    "Format"); bounds are checked.
    """
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    try:
        if len(data) < 8 or length > min(len(data) - 8, _HEADER_LIMIT):
            raise ValueError("the header is longer than the file")
        header: dict[str, Any] = json.loads(data[8 : 8 + length])
        body = memoryview(data)[8 + length :]
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        return {name: _tensor(entry, body) for name, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: damaged .safetensors file: {first_line(error)}") from None


def _tensor(entry: Mapping[str, Any], body: memoryview) -> NDArray[Any]:
    start, stop = entry["data_offsets"]
    dtype, shape = np.dtype(SAFETENSORS_TYPES[entry["dtype"]]), tuple(map(int, entry["shape"]))
    if not 0 <= start <= stop <= len(body) or stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"a tensor {list(shape)} at bytes {start} to {stop} of {len(body)}")
    array = np.frombuffer(body[start:stop], dtype).reshape(shape)
    return _widened(array) if entry["dtype"] == "BF16" else array.copy()


def _torch(path: Path) -> Arrays:
    import torch

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many types, some with a page of advice to load it unsafely
        raise UsageError(
            f"{path}: cannot be read as plain tensors ({type(error).__name__}); save the "
            "state_dict of the model: torch.save(model.state_dict(), FILE)"
        ) from None
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(torch.is_tensor(t) for t in loaded.values()):
        raise UsageError(f"{path}: expected a state_dict of tensors, got {type(loaded).__name__}")
    return {
        name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
        for name, tensor in loaded.items()
    }


def write_weights(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write arrays to a new `.npz`, `.safetensors`, `.pt` or `.pth` file, which is complete or not
    there at all.

    Args:
        path: the file.
        arrays: by name; uint16 are the bits of bfloat16, as in a checkpoint.

    Raises:
        UsageError: another format, or the file exists.
    """
    writers = {
        ".npz": _write_npz,
        ".safetensors": _write_safetensors,
        ".pt": _write_torch,
        ".pth": _write_torch,
    }
    if path.suffix not in writers:
        raise UsageError(f"{path}: expected a file name that ends in {', '.join(writers)}")
    if path.exists():
        raise UsageError(f"{path}: exists; remove it or choose another name")
    with replacing(path) as temporary:
        writers[path.suffix](temporary, arrays)


def _write_npz(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """bfloat16, which numpy does not have, becomes float32."""
    with path.open("wb") as file:
        np.savez(file, **{n: _widened(a) for n, a in arrays.items()})  # type: ignore[arg-type]


def _write_safetensors(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    names = {np.dtype(numpy): name for name, numpy in SAFETENSORS_TYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    # larger types first, so that every tensor is aligned
    items = sorted(arrays.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    stop = 0
    for name, array in items:
        if array.dtype not in names:
            raise UsageError(f".safetensors has no {array.dtype}, the type of {name}; use .npz")
        start, stop = stop, stop + array.nbytes
        header[name] = {
            "dtype": names[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, stop],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, array in items:
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def _write_torch(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    import torch

    def tensor(array: NDArray[Any]) -> torch.Tensor:
        copied = torch.from_numpy(array.copy())
        return copied.view(torch.bfloat16) if array.dtype == np.uint16 else copied

    with path.open("wb") as file:  # an OSError where torch raises a RuntimeError of many lines
        torch.save({name: tensor(array) for name, array in arrays.items()}, file)


def _widened(array: NDArray[Any]) -> NDArray[Any]:
    """bfloat16 bits as float32, of which they are the upper half; others unchanged."""
    if array.dtype != np.uint16:
        return array
    return (array.astype(np.uint32) << 16).view(np.float32)
