"""docs/verify_checkpoint.py knows the format from its description alone."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_absa.checkpoint import Content, Group, Store, seal, write
from hpc_absa.checkpoint.shards import of
from tests.checkpoint.contents import content, split

SCRIPT = Path(__file__).parents[2] / "docs" / "verify_checkpoint.py"


def verdict(path):
    done = subprocess.run(
        [sys.executable, "-I", SCRIPT, path], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def flip(path):
    spoiled = bytearray(path.read_bytes())
    spoiled[-100] ^= 1
    path.write_bytes(spoiled)


def edit(path):
    with h5py.File(path, "r+") as file:
        file["schedule"].attrs["waited"] = 2
    seal.seal(path, 512)


@pytest.mark.parametrize(
    ("spoil", "status", "words"),
    [
        (lambda path: None, 0, "good"),
        (flip, 1, "damaged: x.h5: its bytes"),
        (edit, 1, "damaged: x.h5: its content"),
        (lambda path: path.write_bytes(b""), 1, "damaged"),
    ],
    ids=["good", "flipped bit", "other content", "empty"],
)
def test_verdict(tmp_path, spoil, status, words):
    path = tmp_path / "x.h5"
    plain = content()
    odd = Group({"yes": True, "λ": -1.5}, {"a/b": np.zeros((0, 2)), "bits": np.eye(2) > 0})
    write(path, Content(plain.attributes, {**plain.groups, "odd": odd}))
    spoil(path)
    found, told = verdict(path)
    assert found == status
    assert words in told


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda shards: None, "good"),
        (lambda shards: flip(shards[1]), "0002-of-0003.shard: its bytes"),
        (lambda shards: shards[1].unlink(), "0002-of-0003.shard: its bytes"),
        (
            lambda shards: shards[1].write_bytes(shards[0].read_bytes()),
            "0002-of-0003.shard: its content",
        ),
    ],
    ids=["good", "flipped bit", "missing", "swapped"],
)
def test_verdict_on_shards(tmp_path, spoil, words):
    path, store = tmp_path / "step-0000000120-phase-001.h5", Store(tmp_path, 2)
    _, bare, pieces = split(content(), 3)
    parts = [store.write_shard(path, "0a", n, 3, piece) for n, piece in enumerate(pieces, 1)]
    store.publish(path, bare, tuple(parts))
    spoil(of(path))
    found, told = verdict(path)
    assert found == (words != "good")
    assert words in told


def test_a_shard_is_no_whole_checkpoint(tmp_path):
    part = Store(tmp_path, 2).write_shard(tmp_path / "step-1.h5", "0a", 1, 1, content())
    found, told = verdict(tmp_path / part.name)
    assert (found, told[:8]) == (1, "damaged:")
    assert "no whole checkpoint" in told


def test_it_has_no_code_of_ours():
    imports = [line for line in SCRIPT.read_text().splitlines() if "import " in line]
    assert imports
    assert not any("hpc_absa" in line for line in imports)
