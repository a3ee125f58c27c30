"""The examples of docs/data.md run unchanged."""

import re
from pathlib import Path

import torch

from hpc_absa.data.datasets import MapDataset
from hpc_absa.data.prepare import pack
from hpc_absa.data.registry import DATASETS
from hpc_absa.data.sources import load
from hpc_absa.models import build
from hpc_absa.models.registry import builtin_models

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text()


def test_user_defined_data_set_and_model(tmp_path, monkeypatch):
    for name, text in re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGE, re.DOTALL):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    packed = pack("mydata:blobs", None, {"samples": 50}, tmp_path / "set.h5")
    assert (len(packed.train), len(packed.test), packed.channels) == (40, 10, 2)
    text = MapDataset("mytext:lines", load("mytext:lines", None, {"count": 40}))
    assert (len(text.train), len(text.test), len(text.classes)) == (40, 10, 50)
    model = build("mymodel:perceptron", {"hidden": 4}, packed.channels, packed.image_size, 3)
    assert model(torch.tensor(packed.train.images[:5])).shape == (5, 3)


def test_every_built_in_name_is_on_the_page():
    named = set(re.findall(r"`([\w-]+)`", PAGE))
    assert set(DATASETS) <= named
    depths = {f"resnet{depth}" for depth in re.findall(r"`-(\d+)`", PAGE)}
    assert set(builtin_models()) <= named | depths
