"""How many ranks a global batch can feed, and how its microbatches are split among them."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

from hpc_absa import allocation
from hpc_absa.allocation import Hosts
from hpc_absa.config import Job, Launchable
from hpc_absa.errors import UsageError

MOST_REPRODUCIBLE = 64
"""The largest number of ranks of a reproducible job."""


def limit(job: Launchable) -> int:
    """The largest number of ranks: the job's, or slots of its hosts or allocation, or cores."""
    if job.ranks.max is not None:
        return job.ranks.max
    if hosts := stated_hosts(job):
        return sum(slots for _, slots in hosts)
    if current := allocation.detect():
        return current.slots
    return max(job.ranks.initial, len(os.sched_getaffinity(0)))


def gpus_here(job: Launchable, devices: Path = Path("/dev")) -> int:
    """GPUs of this host where the ranks of a job file all run here, each on one of them, or 0."""
    if not isinstance(job, Job) or job.train.device == "cpu":
        return 0
    if stated_hosts(job) or allocation.detect():  # whose slots the user has stated
        return 0
    spec = find_spec("torch")  # an import takes seconds
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    if not version or not re.search(r"^cuda\b.*= *'", version.read_text(), re.MULTILINE):
        return 0
    gpus = len(list(devices.glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return gpus
    words = re.findall(r"[^,\s]+", visible)  # CUDA reads up to a negative one: -1 is no GPU
    return min(gpus, len(list(takewhile(lambda word: not word.startswith("-"), words))))


def stated_hosts(job: Launchable) -> Hosts:
    """The hosts that the job names with their slots, in its order; empty where it names none.

    Raises:
        UsageError: the host file cannot be read, or has a line of another form.
    """
    if not job.launch.hostfile:
        return hosts(job.launch.hosts) if job.launch.hosts else []
    path = job.launch.hostfile
    slots: dict[str, int] = {}
    for line in allocation.read_lines(path, "launch.hostfile"):
        match = _HOSTFILE_LINE.fullmatch(line)
        if not match:
            raise UsageError(f"{path}: {line!r}: expected a line like 'name slots=4' or 'name:4'")
        slots[match["name"]] = slots.get(match["name"], 0) + int(match["slots"] or match["n"] or 1)
    if not slots:
        raise UsageError(f"{path}: no host in it; expected lines like 'name slots=4'")
    return list(slots.items())


_HOSTFILE_LINE = re.compile(
    r"(?P<name>[^\s:=]+)(:(?P<n>0*[1-9]\d*)|\s+slots\s*=\s*(?P<slots>0*[1-9]\d*)(\s+\S+=\S+)*)?"
)
"""Open MPI's form, its other options ignored, and the form of MPICH and Horovod."""


def hosts(words: str) -> Hosts:
    """A valid `launch.hosts` such as `a:4,b` as `[("a", 4), ("b", 1)]`."""
    parts = (word.strip().partition(":") for word in words.split(","))
    return [(name, int(slots or 1)) for name, _, slots in parts]


def ranks_for(job: Job, global_batch: int, limit: int) -> int:
    """Ranks that shorten a step of `global_batch` samples, at most `limit`.

    Each rank should have `ranks.microbatches_per_rank` microbatches. Ranks that would not shorten
    the step are not used: 5 microbatches take two rounds on 4 ranks and on 3. Reproducible jobs
    have a power of two, at most `MOST_REPRODUCIBLE`.
    """
    microbatches = global_batch // job.train.microbatch
    most = max(1, microbatches // job.ranks.microbatches_per_rank)
    most = max(job.ranks.initial, min(most, limit))
    if job.train.reproducible:
        most = min(most, MOST_REPRODUCIBLE)
        most = max(job.ranks.initial, 1 << (most.bit_length() - 1))
    rounds = -(-microbatches // most)
    wanted = max(job.ranks.initial, -(-microbatches // rounds))
    if job.train.reproducible:
        return min(most, 1 << (wanted - 1).bit_length())
    return wanted


def share(microbatches: range, rank: int, size: int) -> range:
    """The contiguous microbatches of one rank; shares differ by at most one."""
    count = len(microbatches)
    return microbatches[rank * count // size : (rank + 1) * count // size]
