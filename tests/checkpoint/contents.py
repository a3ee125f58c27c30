"""Small checkpoints for tests, and ways to spoil them."""

import contextlib
import os
import subprocess

import numpy as np
import pytest

from hpc_absa.checkpoint import Content, Group

ATTRIBUTES = {"epoch": 3, "step": 120, "samples": 3840, "world_size": 2, "global_batch": 64}


def content(step=120, weight=0.5):
    """A checkpoint as the training writes it, small."""
    return Content(
        {**ATTRIBUTES, "step": step},
        {
            "model": Group(
                {},
                {
                    "conv.weight": np.full((4, 3, 3, 3), weight, np.float32),
                    "bn.num_batches_tracked": np.array(7),
                },
            ),
            "optimizer": Group({"name": "sgd"}, {"momentum.conv.weight": np.arange(108.0)}),
            "schedule": Group({"global_batch": 64, "lr": 0.1, "reference": 7.25, "waited": 1}),
            "curvature": Group({}, {}),
            "job": Group({"text": 'name = "digits"\n' * 20}),
        },
    )


def split(whole, count):
    """`whole`, it without arrays, and its arrays dealt to `count` pieces."""
    bare = Content(whole.attributes, {n: Group(g.attributes) for n, g in whole.groups.items()})
    pieces = []
    for number in range(count):
        groups = {}
        for index, ((name, key), array) in enumerate(whole.arrays().items()):
            if index % count == number:
                groups.setdefault(name, {})[key] = array
        attributes = {"step": whole.attributes["step"]}
        pieces.append(Content(attributes, {n: Group({}, a) for n, a in groups.items()}))
    return whole, bare, pieces


def assert_same(found, wanted):
    """Bit for bit, with types."""
    assert found.attributes == wanted.attributes
    assert found.groups.keys() == wanted.groups.keys()
    for name, group in wanted.groups.items():
        assert dict(found.groups[name].attributes) == dict(group.attributes)
        assert found.groups[name].arrays.keys() == group.arrays.keys()
        for key, array in group.arrays.items():
            other = found.groups[name].arrays[key]
            assert (other.dtype, other.shape) == (array.dtype, array.shape)
            assert other.tobytes() == array.tobytes()


@contextlib.contextmanager
def mounted(folder, options):
    """A tmpfs at `folder`; skips where this user cannot mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
