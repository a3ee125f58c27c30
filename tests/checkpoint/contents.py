"""Small checkpoints for tests, and ways to damage them."""

import contextlib
import os
import subprocess
import zlib

import numpy as np
import pytest

from hpc_absa.checkpoint import Content, Group, integrity

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
            "schedule": Group(
                {"global_batch": 64, "lr": 0.1, "reference": 7.25, "patience_count": 1}
            ),
            "curvature": Group({}, {}),
            "job": Group({"text": 'name = "digits"\n' * 20}),
        },
    )


def snapshot(tensors, copies=None):
    """Arrays with the values of `tensors`, as a save takes them."""
    from hpc_absa.checkpoint.async_checkpointer import HostCopies  # which loads torch

    copies = copies or HostCopies()
    arrays = copies.reserve(tensors)
    copies.copy(tensors)
    return arrays


def split(whole, count):
    """`whole` without arrays, and its arrays in `count` pieces."""
    bare = Content(whole.attributes, {n: Group(g.attributes) for n, g in whole.groups.items()})
    pieces = []
    for number in range(count):
        groups = {}
        for index, ((name, key), array) in enumerate(whole.arrays().items()):
            if index % count == number:
                groups.setdefault(name, {})[key] = array
        attributes = {"step": whole.attributes["step"]}
        pieces.append(Content(attributes, {n: Group({}, a) for n, a in groups.items()}))
    return bare, pieces


def shards_of(path):
    """The shard files of a checkpoint, also of unfinished saves."""
    return sorted(path.parent.glob(f"{path.stem}.*.shard"))


def flip_bit(path, position=-1):
    """Change the lowest bit of one byte of a file."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def seal(path):
    """Give a file that was changed through HDF5 a first block that matches it."""
    data, chunk = path.read_bytes(), integrity.CHUNK
    block = data.index(integrity.HDF5_MAGIC)
    starts = range(block, len(data), chunk)
    checksums = [zlib.crc32(data[start : start + chunk]) for start in starts]
    path.write_bytes(integrity.first_block(block, len(data), checksums) + data[block:])


def assert_same(actual, expected):
    """Bit for bit, with types."""
    assert actual.attributes == expected.attributes
    assert actual.groups.keys() == expected.groups.keys()
    for name, group in expected.groups.items():
        assert dict(actual.groups[name].attributes) == dict(group.attributes)
        assert actual.groups[name].arrays.keys() == group.arrays.keys()
        for key, array in group.arrays.items():
            other = actual.groups[name].arrays[key]
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
