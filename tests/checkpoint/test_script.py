"""docs/verify_checkpoint.py knows the format from its description alone."""

import hashlib
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpc_absa.checkpoint import CheckpointManager, Content, Group, format, write
from tests.checkpoint.contents import content, flip_bit, seal, shards_of, split

SCRIPT = Path(__file__).parents[2] / "docs" / "verify_checkpoint.py"


def run_script(path):
    done = subprocess.run(
        [sys.executable, "-I", SCRIPT, path], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def change_and_seal(path):
    with h5py.File(path, "r+") as file:
        file["schedule"].attrs["patience_count"] = 2
    seal(path)


@pytest.mark.parametrize(
    ("damage", "status", "message"),
    [
        (lambda path: None, 0, "good"),
        (flip_bit, 1, "damaged: x.h5: its bytes"),
        (change_and_seal, 1, "damaged: x.h5: its content"),
        (lambda path: path.write_bytes(b""), 1, "damaged"),
    ],
    ids=["good", "flipped bit", "other content", "empty"],
)
def test_exit_status_and_message(tmp_path, damage, status, message):
    path = tmp_path / "x.h5"
    plain = content()
    odd = Group({"yes": True, "λ": -1.5}, {"a/b": np.zeros((0, 2)), "bits": np.eye(2) > 0})
    write(path, Content(plain.attributes, {**plain.groups, "odd": odd}))
    damage(path)
    actual, output = run_script(path)
    assert actual == status
    assert message in output


def test_a_digest_of_earlier_versions_is_verified(tmp_path, monkeypatch):
    monkeypatch.setattr(format, "DIGEST", "sha256")
    monkeypatch.setattr(format, "xxh3_128", hashlib.sha256)
    write(tmp_path / "x.h5", content())
    assert run_script(tmp_path / "x.h5") == (0, "good\n")
    change_and_seal(tmp_path / "x.h5")
    assert run_script(tmp_path / "x.h5")[0] == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda shards: None, "good"),
        (lambda shards: flip_bit(shards[1]), "0002-of-0003.shard: its bytes"),
        (lambda shards: shards[1].unlink(), "0002-of-0003.shard: its bytes"),
        (
            lambda shards: shards[1].write_bytes(shards[0].read_bytes()),
            "0002-of-0003.shard: its content",
        ),
    ],
    ids=["good", "flipped bit", "missing", "swapped"],
)
def test_exit_status_and_message_with_shards(tmp_path, damage, message):
    path, manager = tmp_path / "step-0000000120-phase-001.h5", CheckpointManager(tmp_path, 2)
    bare, pieces = split(content(), 3)
    shards = [manager.write_shard(path, "0a", n, 3, piece) for n, piece in enumerate(pieces, 1)]
    manager.publish(path, bare, tuple(shards))
    damage(shards_of(path))
    actual, output = run_script(path)
    assert actual == (message != "good")
    assert message in output


def test_a_shard_is_not_a_whole_checkpoint(tmp_path):
    manager = CheckpointManager(tmp_path, 2)
    shard = manager.write_shard(tmp_path / "step-1.h5", "0a", 1, 1, content())
    actual, output = run_script(tmp_path / shard.name)
    assert (actual, output[:8]) == (1, "damaged:")
    assert "no whole checkpoint" in output


def test_the_script_imports_nothing_of_this_package():
    imports = [line for line in SCRIPT.read_text().splitlines() if "import " in line]
    assert imports
    assert not any("hpc_absa" in line for line in imports)
