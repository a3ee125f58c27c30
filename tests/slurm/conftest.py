"""`cluster`: one four-node Slurm for all tests here, or the reason why there is none."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm import accounting
from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Four idle nodes of two CPUs; a test that ends daemons starts them again."""
    if why := missing():
        pytest.skip(why)
    yield from _started(accounts=False)


@pytest.fixture(scope="module")
def accounted_cluster() -> Iterator[Cluster]:
    """A second one, with slurmdbd and its database, so that `sacct` knows its jobs."""
    if why := missing() or missing(accounting.PROGRAMS, "slurmdbd, mariadb-server"):
        pytest.skip(why)
    yield from _started(accounts=True)


def _started(accounts: bool) -> Iterator[Cluster]:
    # not pytest's folder: munged requires a socket that every user can reach
    with tempfile.TemporaryDirectory(prefix="absa-slurm-", ignore_cleanup_errors=True) as folder:
        cluster = Cluster(Path(folder), accounts)
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
