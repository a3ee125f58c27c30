import resource
import signal
import subprocess
import sys

import h5py
import numpy as np
import pytest

from hpc_absa.hdf5 import reserve, write_at


def test_hdf5_reads_what_was_written_past_it(tmp_path):
    path = tmp_path / "arrays.h5"
    arrays = {
        "vector": np.arange(5, dtype=np.float32),
        "blocks/0/weight": np.arange(24.0).reshape(2, 3, 4),
        "blocks/0/größe": np.array(7),
        "empty": np.empty((0, 3), np.int64),
    }
    with h5py.File(path, "w") as file:
        group = file.create_group("model")
        offsets = {k: reserve(group.id, k, a.dtype, a.shape) for k, a in arrays.items()}
    with path.open("r+b") as file:
        for key, array in arrays.items():
            write_at(file.fileno(), memoryview(array.tobytes()), offsets[key])
    with h5py.File(path) as file:
        for key, array in arrays.items():
            read = file["model"][key]
            assert (read.dtype, read.shape, read.chunks) == (array.dtype, array.shape, None)
            assert np.array_equal(read[()], array)


FULL_DISK = """
import sys
import h5py, numpy as np
from hpc_absa.hdf5 import MemoryFile, reserve

with open(sys.argv[1], "xb", 0) as file:
    image = MemoryFile()
    with h5py.File(image, "w", libver=("v110", "v110")) as layout:
        layout.attrs["text"] = np.bytes_("x" * 300)
        layout["names"] = np.array([b"name"] * 1000)
        reserve(layout.id, "a/images", np.dtype("u1"), (1000, 3, 16, 16))
    try:
        image.write_to(file.fileno())
    except OSError as error:
        sys.exit(error.errno)
"""


@pytest.mark.parametrize("limit", [0, 100, 1000, 100_000])
def test_a_layout_that_cannot_be_written_raises_and_does_not_crash(tmp_path, limit):
    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "arrays.h5")]
    ended = subprocess.run(command, preexec_fn=limited, timeout=60)
    assert ended.returncode == 27  # EFBIG
