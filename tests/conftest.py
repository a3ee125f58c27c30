"""Settings of all tests: one thread each, and examples that may take as long as they take."""

import os

from hypothesis import settings

# Before torch is imported. `make test` runs several files at a time: threads would compete.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
