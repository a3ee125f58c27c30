"""Packs on all ranks, whole, resumed and with errors, and trains on the result.

usage: packing_program.py ROOT DAMAGED FOLDER
"""

import errno
import itertools
import os
import sys
from pathlib import Path

import pytest

from hpc_absa import cli
from hpc_absa.comm import connect
from hpc_absa.data import checking, encoded_packing
from hpc_absa.data.checking import on_rank_0
from hpc_absa.data.prepare import pack
from hpc_absa.errors import CollectiveError
from tests.data.test_encoded import S, train
from tests.mpi.test_packing import digest

comm = connect()
root, damaged, folder = map(Path, sys.argv[1:])
encoded_packing.BLOCK = 3
KEYS = {"image_size": S, "encoded": True}


def packed(name, source=root, **keys):
    """The files that this rank read."""
    reads, check = [], checking._check
    checking._check = lambda *file: reads.append(file[0]) or check(*file)
    try:
        on_rank_0(comm, lambda: pack("imagefolder", source, KEYS | keys, folder / name, comm=comm))
    finally:
        checking._check = check
    return reads


def fails(name, *words, **keys):
    with pytest.raises(CollectiveError) as caught:
        packed(name, **keys)
    lines = comm.allgather_object(f"{caught.value} {caught.value.status}")
    assert len(set(lines)) == 1, lines
    assert all(word in lines[0] for word in words), lines[0]
    assert not (folder / name).exists()


def broken(errors, action):
    """`action` raises OSError in the third call on the ranks that have an error."""
    calls = itertools.count(1)

    def method(*arguments):
        if next(calls) == 3 and comm.rank in errors:
            raise OSError(errors[comm.rank], os.strerror(errors[comm.rank]), "disk")
        return action(*arguments)

    return method


reads = packed("two.h5")
assert len(reads) == (12, 10)[comm.rank], "blocks of 3 of 16 and 6 files, in turn"
assert len(packed("three.h5")) == (7, 6)[comm.rank], "9 files are packed already"
packed("skip.h5", source=damaged, unreadable="skip")
fails("stop.h5", "00.jpg: unreadable image", "data.unreadable = 'skip'", source=damaged)
write, read = encoded_packing.write_at, Path.read_bytes
encoded_packing.write_at = broken({0: errno.ENOSPC}, write)
fails("full.h5", "cannot be written", "No space left on device")
encoded_packing.write_at = write
Path.read_bytes = broken({1: errno.ENOENT}, read)
fails("elsewhere.h5", "gone since the files were listed, or not on")
Path.read_bytes = broken({1: errno.EIO}, read)
fails("disk.h5", "unreadable file (Input/output error)")
Path.read_bytes = read

ranks = [f"ranks.{key}={comm.size}" for key in ("initial", "max")]
trained, _ = train(root, folder / "run2", "train.reproducible=true", *ranks, comm=comm)
(folder / f"rank{comm.rank}").write_text(digest(trained))
arguments = ["--root", damaged, "--image-size", S, "--encoded", "--out", folder / "cli.h5"]
sys.argv = ["hpc-absa", "data", "imagefolder", *map(str, arguments)]
cli.main()
