"""docs/verify_checkpoint.py knows the format from its description alone."""

import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_absa.checkpoint import Content, Group, seal, write
from tests.checkpoint.contents import content

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
        (flip, 1, "damaged: its bytes"),
        (edit, 1, "damaged: its content"),
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


def test_it_has_no_code_of_ours():
    imports = [line for line in SCRIPT.read_text().splitlines() if "import " in line]
    assert imports
    assert not any("hpc_absa" in line for line in imports)
