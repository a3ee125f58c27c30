"""The batch job of one link of a chain: its size and its script."""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from hpc_absa.config import Launchable
from hpc_absa.rundir import RunDir
from hpc_absa.supervisor.process import PYTHON
from hpc_absa.supervisor.slurm import Partition


@dataclass(frozen=True)
class Size:
    """What one batch job asks for."""

    nodes: int
    ranks: int
    per_node: int
    """Ranks of a full node."""
    threads: int
    """CPUs of one rank."""
    gpus: int | None
    """GPUs of one node, one a rank; None where the job asks for none."""

    def __str__(self) -> str:
        nodes = "1 node" if self.nodes == 1 else f"{self.nodes} nodes"
        return f"{self.ranks} rank{'s' * (self.ranks > 1)} on {nodes}"


def ranks_per_node(job: Launchable, partition: Partition) -> int:
    """As the job states, or one per GPU, or as many as the cores have threads for."""
    stated = job.launch.ranks_per_node or job.launch.slurm.gpus_per_node
    return stated or max(1, partition.cpus // (job.train.threads_per_rank or 1))


def most_ranks(job: Launchable, partition: Partition) -> int:
    """Ranks that one batch job in the partition can have now, at most `ranks.max`."""
    most = partition.max_nodes * ranks_per_node(job, partition)
    return min(most, job.ranks.max or most)


def size_of(job: Launchable, ranks: int, partition: Partition) -> Size:
    """A batch job for `ranks` ranks, on as few nodes as hold them."""
    fill = ranks_per_node(job, partition)
    nodes = -(-ranks // fill)
    per_node = -(-ranks // nodes)
    threads = job.train.threads_per_rank or 1
    if not job.train.threads_per_rank and not job.train.reproducible:
        threads = max(1, partition.cpus // fill)
    gpus = job.launch.slurm.gpus_per_node
    return Size(nodes, ranks, per_node, threads, min(gpus, per_node) if gpus else None)


def script(
    job: Launchable, run: RunDir, number: int, name: str, size: Size, allow: tuple[str, ...]
) -> str:
    """The batch script of link `number`."""
    options = job.launch.slurm
    directives = {
        "job-name": name,
        "nodes": size.nodes,
        "ntasks": size.ranks,
        "ntasks-per-node": size.per_node,
        "cpus-per-task": size.threads,
        "gpus-per-node": size.gpus,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "time": options.time,
        "signal": f"B:USR1@{options.signal_seconds}",
        "output": str(run.link_log(number).resolve()).replace("%", "%%"),
        "open-mode": "append",
    }
    lines = [
        "#!/bin/bash",
        f"# Link {number} of the chain of batch jobs that trains {job.name!r}.",
        *(
            f"#SBATCH --{key}={shlex.quote(str(value))}"
            for key, value in directives.items()
            if value not in ("", None)
        ),
        "#SBATCH --requeue",
        *(f"#SBATCH {line}" for line in options.sbatch),
    ]
    if options.setup_script:
        setup_script = Path(os.path.expanduser(options.setup_script)).resolve()
        lines.append(f"source {shlex.quote(str(setup_script))}")
    words = [*PYTHON, "-m", "hpc_absa", "link", str(run.path.resolve()), str(number)]
    for key in allow:
        words += ["--allow-changed", key]
    return "\n".join([*lines, f"exec {shlex.join(words)}"]) + "\n"
