"""A large state in shards: written, verified and read by all ranks together."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.mpi


def test_a_large_state_is_written_and_read_by_all_ranks(mpirun, tmp_path):
    done = mpirun(4, Path(__file__).with_name("saving_program.py"), tmp_path)
    assert all(f"rank {rank} of 4 fine" in done.stdout for rank in range(4)), done.stdout
    names = [p.name for p in tmp_path.iterdir() if p.name.startswith("step-0000000003")]
    assert names == [], "a failed save leaves nothing once the next one is on disk"
