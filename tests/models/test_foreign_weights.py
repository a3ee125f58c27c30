"""Weights of other programs: the same arrays from every format, and no code is executed."""

import json
import pickle
import struct

import numpy as np
import pytest
import torch

from hpc_absa.errors import UsageError
from hpc_absa.models.weights import read_weights

ARRAYS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7)}


def write_safetensors(path, header, body):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


@pytest.fixture
def files(tmp_path):
    np.savez(tmp_path / "w.npz", **ARRAYS)
    state = {name: torch.from_numpy(array) for name, array in ARRAYS.items()}
    torch.save(state, tmp_path / "w.pt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "w.pth")
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "n": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
    }
    body = ARRAYS["a.weight"].tobytes() + ARRAYS["n"].tobytes()
    write_safetensors(tmp_path / "w.safetensors", header, body)
    return tmp_path


@pytest.mark.parametrize("name", ["w.npz", "w.pt", "w.pth", "w.safetensors"])
def test_every_format_has_the_same_arrays(files, name):
    found = read_weights(files / name)
    assert found.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        assert found[key].dtype == array.dtype
        np.testing.assert_array_equal(found[key], array)


def test_bfloat16_becomes_float32(tmp_path):
    values = torch.tensor([1.5, -2.0]).bfloat16()
    torch.save({"w": values}, tmp_path / "w.pt")
    header = {"w": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}
    write_safetensors(
        tmp_path / "w.safetensors", header, values.view(torch.int16).numpy().tobytes()
    )
    for name in ("w.pt", "w.safetensors"):
        assert read_weights(tmp_path / name)["w"].tolist() == [1.5, -2.0]


class Code:
    def __reduce__(self):
        return open, ("executed", "w")


def test_code_in_a_file_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Code()))
    torch.save({"w": Code()}, tmp_path / "saved.pt")
    np.savez(tmp_path / "w.npz", w=np.array([Code()], dtype=object))
    for name in ("raw.pt", "saved.pt", "w.npz"):
        with pytest.raises(UsageError, match="cannot be read") as error:
            read_weights(tmp_path / name)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_other_files_are_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"expected a file of weights, \.npz"):
        read_weights(tmp_path / "w.bin")
    with pytest.raises(UsageError, match="no such file"):
        read_weights(tmp_path / "w.npz")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UsageError, match="expected a state_dict of tensors, got list"):
        read_weights(tmp_path / "list.pt")
    for body in (b"", b"\xff" * 8, struct.pack("<Q", 4) + b"{}}}"):
        (tmp_path / "w.safetensors").write_bytes(body)
        with pytest.raises(UsageError, match="damaged"):
            read_weights(tmp_path / "w.safetensors")
    for entry in (
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]},
        {"dtype": "F8", "shape": [1], "data_offsets": [0, 4]},
    ):
        write_safetensors(tmp_path / "w.safetensors", {"w": entry}, b"\0" * 4)
        with pytest.raises(UsageError, match="damaged"):
            read_weights(tmp_path / "w.safetensors")
