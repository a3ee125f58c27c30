"""What a run reports as charged, against what a site's accounting charges."""

import pytest

from hpc_absa.report.timing import account, cost
from tests.slurm.chains import ChainRun
from tests.slurm.cluster import wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

SECONDS_OF_A_JOB = 8.0
"""What a batch job takes before its ranks start and after they ended, in `sacct` alone."""


def charged(cluster, jobs):
    """CPU seconds of each ended job by `sacct`."""
    words = ("sacct", "-n", "-P", "-X", "-j", ",".join(jobs), "-o", "JobID,State,CPUTimeRAW")
    rows = [line.split("|") for line in cluster.command(*words).splitlines()]
    return {row[0]: int(row[2]) for row in rows if row[1] == "COMPLETED"}


def test_rank_seconds_are_those_of_sacct(accounted_cluster, tmp_path):
    """Each rank has one CPU; the chain has links of 1, 2 and 4 nodes."""
    chain = ChainRun(accounted_cluster, tmp_path, most=4)
    code, output = chain.start().finish()
    assert code == 0, output
    ranks = {str(e["job_id"]): e["ranks"] for e in chain.events("link") if "ranks" in e}
    assert sorted(ranks.values()) == [1, 2, 4]
    wait_until(lambda: charged(accounted_cluster, ranks).keys() == ranks.keys(), 60, "sacct's rows")
    theirs = sum(charged(accounted_cluster, ranks).values())
    written = chain.run.log.read()
    ours = cost(written, account(written)).charged
    number = sum(ranks.values())  # `sacct` has whole seconds
    assert theirs - SECONDS_OF_A_JOB * number <= ours <= theirs + number
