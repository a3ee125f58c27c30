"""Encoded images packed by two ranks: the same file as by one, and errors end both."""

import hashlib
import shutil
from pathlib import Path

import pytest

from hpc_absa.data import encoded_packing
from hpc_absa.data.prepare import pack
from hpc_absa.data.sources import load
from hpc_absa.errors import ExitStatus
from tests.data.test_encoded import S, draw_images, train
from tests.training import runs

pytestmark = pytest.mark.mpi

PROGRAM = Path(__file__).with_name("packing_program.py")
PAIRS = {"two": "one", "three": "one", "images": "one", "skip": "one-skip"}
"""Files by two ranks, and the same by one; `images` is packed by training."""
KEYS = {"image_size": S, "encoded": True}


def digest(trained):
    """Of all parameters and the optimizer."""
    bits = runs.state_bits(trained.run.state)
    tensors = b"".join(bits[key] for key in sorted(bits) if key != "progress")
    return hashlib.sha256(tensors).hexdigest()


def test_two_ranks_pack_the_file_of_one_and_train_alike(mpirun, tmp_path, monkeypatch):
    root, damaged = draw_images(tmp_path / "images"), tmp_path / "damaged"
    shutil.copytree(root, damaged)
    first = damaged / "train" / "a" / "00.jpg"
    first.write_bytes(first.read_bytes()[:700])
    monkeypatch.setattr(encoded_packing, "BLOCK", 3)
    one = pack("imagefolder", root, KEYS, tmp_path / "one.h5")
    pack("imagefolder", damaged, KEYS | {"unreadable": "skip"}, tmp_path / "one-skip.h5")

    def stop(done, total):
        if done == 9:
            raise KeyboardInterrupt

    source = load("imagefolder", root, KEYS)
    with pytest.raises(KeyboardInterrupt):
        encoded_packing.pack_encoded(tmp_path / "three.h5", source, "imagefolder", KEYS, stop)

    done = mpirun(2, PROGRAM, root, damaged, tmp_path, check=False, timeout=120)

    assert done.returncode == ExitStatus.USAGE, done.stdout + done.stderr
    for name, expected in PAIRS.items():
        packed, whole = (tmp_path / f"{n}.h5" for n in (name, expected))
        assert packed.read_bytes() == whole.read_bytes(), name
    lists = [tmp_path / f"{name}.h5.unreadable.txt" for name in ("skip", "one-skip")]
    assert lists[0].read_text() == lists[1].read_text()
    assert "00.jpg: unreadable image" in lists[0].read_text()
    trained, _ = train(one.path, tmp_path / "run1", "train.reproducible=true")
    digests = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert digests == [digest(trained)] * 2
    lines = [line for line in done.stderr.splitlines() if "hpc-absa: " in line]
    assert len(lines) == 1, done.stderr
    assert "00.jpg: unreadable image" in lines[0]
