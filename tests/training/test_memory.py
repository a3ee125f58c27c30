"""Freed memory stays with the process, unless the environment says otherwise."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
from hpc_absa.training.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(1 << 20) for _ in range(8)]  # of 8 MiB
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
print(faults(), min(faults() for _ in range(3)))
"""


@pytest.mark.parametrize("setting", [None, "65536"])
def test_memory_of_freed_tensors_is_used_again(setting):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if setting:
        environment["MALLOC_TRIM_THRESHOLD_"] = setting
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    first, later = map(int, done.stdout.split())
    assert first > 100
    assert (later < first / 10) == (setting is None)
