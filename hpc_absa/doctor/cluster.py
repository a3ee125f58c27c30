"""Slurm, and hosts given by name."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from hpc_absa import allocation, worldsize
from hpc_absa.config import Job
from hpc_absa.doctor.finding import Finding, absent, fault, good
from hpc_absa.errors import HpcAbsaError, UsageError
from hpc_absa.supervisor.batch import most_ranks
from hpc_absa.supervisor.hosts import agent_of, is_here
from hpc_absa.supervisor.slurm import Slurm, SlurmSilentError

SKEW = 2.0
"""Seconds by which clocks may differ: events of several hosts are put in order by their times."""


def check_cluster(job: Job | None) -> Iterator[Finding]:
    """All of it."""
    yield from _slurm(job)
    try:
        given = allocation.present()
        yield good("allocation", str(given)) if given else absent("allocation", "in no batch job")
    except UsageError as error:
        yield fault("allocation", str(error), "leave this shell, and enter the job anew")
    if job is not None:
        yield from _hosts(job)


def _slurm(job: Job | None) -> Iterator[Finding]:
    wanted = job is not None and job.launch.launcher == "slurm"
    try:
        slurm = Slurm(seconds=20)
    except UsageError as error:
        if wanted:
            cure = "log in where sbatch is, or apt-get install slurm-client, or another launcher"
            yield fault("slurm client", str(error), cure)
        else:
            yield absent("slurm client", "no sbatch on PATH")
        return
    try:
        partition = slurm.partition(job.launch.slurm.partition if job else "")
    except SlurmSilentError as error:
        if not wanted and "configuration source" in str(error):
            yield absent("slurm controller", "the client is installed, for no cluster")
            return
        yield fault(
            "slurm controller",
            str(error),
            "wait, or ask your site; SLURM_CONF must name the cluster's slurm.conf",
        )
        return
    except HpcAbsaError as error:
        yield fault("slurm partition", str(error), "sinfo -s lists the partitions")
        return
    yield good("slurm controller", f"answers; {partition.max_nodes} nodes in {partition.name}")
    if not wanted or job is None:
        return
    most = most_ranks(job, partition)
    if most < job.ranks.initial:
        yield fault(
            "slurm partition",
            f"{partition.name} gives one job {most} ranks, ranks.initial = {job.ranks.initial}",
            "lower ranks.initial, raise launch.ranks_per_node, or choose another partition",
        )
    setup_script = job.launch.slurm.setup_script
    if setup_script and not Path(setup_script).expanduser().is_file():
        yield fault(
            "slurm setup script",
            f"launch.slurm.setup_script = {setup_script!r}: no such file",
            "write the `module load` lines of your site into it, or leave the key out",
        )


def _hosts(job: Job) -> Iterator[Finding]:
    named = worldsize.stated_hosts(job)
    if not named:
        yield absent("hosts", "the job names none")
        return
    slots = sum(count for _, count in named)
    if slots < job.ranks.initial:
        yield fault(
            "slots",
            f"ranks.initial = {job.ranks.initial}, the hosts have {slots} slots",
            "give the hosts their cores as slots, as in host:4, or name more hosts",
        )
    else:
        yield good("slots", f"{slots} on {len(named)} hosts")
    agent = agent_of(job)
    if not shutil.which(agent[0]):
        cure = "install it (Debian: openssh-client), or set launch.rsh_agent"
        yield fault("hosts", f"{agent[0]}: not on PATH", cure)
        return
    for host, _ in named:
        if not is_here(host):
            yield from _host(host, agent)


def _host(host: str, agent: tuple[str, ...]) -> Iterator[Finding]:
    """Three questions in one visit: does it answer, what time is it, is our Python there."""
    question = f"date +%s.%N; test -x {sys.executable} && echo there"
    before = time.time()
    try:
        done = subprocess.run(
            [*agent, host, question],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )
        words = done.stdout.split()
        clock = float(words[0])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        yield fault(
            "hosts",
            f"{host} does not answer to {' '.join(agent)}",
            f"make `{' '.join(agent)} {host} true` work without a password: ssh-copy-id {host}",
        )
        return
    after = time.time()
    skew = max(before - clock, clock - after, 0.0)
    if skew > SKEW:
        yield fault(
            "clocks",
            f"{host}'s clock differs by {skew:.0f} s from this machine's",
            "have chrony or ntpd set both: timedatectl set-ntp true",
        )
    if "there" not in words:
        yield fault(
            "environment on hosts",
            f"{host} has no {sys.executable}",
            "put the environment on a file system that all hosts share, under the same path",
        )
    if skew <= SKEW and "there" in words:
        yield good("hosts", f"{host} answers, has the environment and our time")
