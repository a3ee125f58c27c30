"""Files of weights: what is written is read, by us and by the formats' own programs."""

import json

import numpy as np
import pytest
import torch

from hpc_absa.errors import UsageError
from hpc_absa.models.weights import read_weights, write_weights

ARRAYS = {
    "layer.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "layer.double": np.array([0.1], dtype=np.float64),
    "layer.steps": np.array(3, dtype=np.int64),
    "layer.mask": np.array([True, False, True]),
    "layer.half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16).view(torch.uint16).numpy(),
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors", ".npz"])
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    write_weights(path, ARRAYS)
    read = read_weights(path)
    assert read.keys() == ARRAYS.keys()
    assert read["layer.half"].tolist() == [1.5, -2.0]
    for name in ARRAYS.keys() - {"layer.half"}:
        assert read[name].dtype == ARRAYS[name].dtype
        np.testing.assert_array_equal(read[name], ARRAYS[name])
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(UsageError, match="exists; remove it"):
        write_weights(path, ARRAYS)


def test_a_pt_file_is_a_plain_state_dict(tmp_path):
    write_weights(tmp_path / "model.pt", ARRAYS)
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    assert type(state) is dict
    assert state["layer.half"].dtype == torch.bfloat16
    assert torch.equal(state["layer.weight"], torch.from_numpy(ARRAYS["layer.weight"]))


def test_a_safetensors_file_is_as_its_specification_says(tmp_path):
    """github.com/huggingface/safetensors, "Format"."""
    write_weights(tmp_path / "model.safetensors", ARRAYS)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    assert header.pop("__metadata__") == {"format": "pt"}
    body, ends = data[8 + length :], sorted(e["data_offsets"] for e in header.values())
    assert [start for start, _ in ends] == [0, *(stop for _, stop in ends[:-1])]  # no holes
    assert ends[-1][1] == len(body)
    entry = header["layer.half"]
    assert (entry["dtype"], entry["shape"]) == ("BF16", [2])
    start, stop = header["layer.weight"]["data_offsets"]
    assert np.frombuffer(body[start:stop], "<f4").tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["model", "model.h5", "model.onnx"])
def test_other_formats_are_refused(tmp_path, name):
    with pytest.raises(UsageError, match=r"expected a file name that ends in \.npz"):
        write_weights(tmp_path / name, ARRAYS)
    with pytest.raises(UsageError, match=r"expected a file of weights"):
        read_weights(tmp_path / name)


class Code:
    def __reduce__(self):
        return print, ("executed",)


def test_code_in_a_file_is_not_executed(tmp_path, capsys):
    torch.save({"weight": Code()}, tmp_path / "model.pt")
    np.savez(tmp_path / "model.npz", weight=np.array([Code()], dtype=object))
    for name in ("model.pt", "model.npz"):
        with pytest.raises(UsageError, match="cannot be read"):
            read_weights(tmp_path / name)
    assert "executed" not in capsys.readouterr().out


def test_a_type_that_safetensors_does_not_have(tmp_path):
    with pytest.raises(UsageError, match=r"^\.safetensors has no complex64, the type of rope"):
        write_weights(tmp_path / "model.safetensors", {"rope": np.ones(2, np.complex64)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff" * 8, (2).to_bytes(8, "little") + b"[]", (4).to_bytes(8, "little") + b"{}}}"],
)
def test_damaged_safetensors_files_are_refused(tmp_path, data):
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(UsageError, match="damaged"):
        read_weights(tmp_path / "model.safetensors")
