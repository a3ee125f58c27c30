"""Keys of job files that have a new name; the old one works for one release, with a warning."""

from __future__ import annotations

import os
import sys
from typing import Any

from hpc_absa.errors import UsageError

RENAMED = {
    "train.remainder": "train.drop_last",
    "train.clip_norm": "train.max_grad_norm",
    "train.decay_spares_vectors": "train.no_decay_norm_bias",
    "launch.agent": "launch.rsh_agent",
    "launch.silence_seconds": "launch.heartbeat_timeout",
    "launch.stuck_seconds": "launch.progress_timeout",
    "launch.slurm.prologue": "launch.slurm.setup_script",
    "launch.slurm.lead": "launch.slurm.signal_seconds",
}
"""New names by old ones, as they stand in a job file."""

VALUES: dict[str, dict[Any, Any]] = {"train.remainder": {"carry": False, "drop": True}}
"""New values by old ones, where those changed too."""

_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID", "HOROVOD_RANK")
_warned: set[str] = set()


def rename_keys(tables: dict[str, Any], origin: str, *, warn: bool) -> None:
    """Replace old keys in the tables of a job file, in place.

    Args:
        tables: as TOML gives them.
        origin: the file, for messages.
        warn: name each old key once on standard error, on rank 0 alone.

    Raises:
        UsageError: a key stands there under both names, or an old key has an unknown value.
    """
    for old, new in RENAMED.items():
        *path, name = old.split(".")
        table: Any = tables
        for word in path:
            table = table.get(word) if isinstance(table, dict) else None
        if not isinstance(table, dict) or name not in table:
            continue
        if (fresh := new.split(".")[-1]) in table:
            raise UsageError(f"{origin}: {old} is the old name of {new}: expected only {new}")
        value = table.pop(name)
        if (values := VALUES.get(old)) is not None:
            if value not in values:
                known = ", ".join(
                    f"{v!r} (now {new} = {str(w).lower()})" for v, w in values.items()
                )
                raise UsageError(f"{origin}: {old} = {value!r}: expected {known}")
            value = values[value]
        table[fresh] = value
        if warn and old not in _warned and not any(_rank(v) for v in _RANK_VARIABLES):
            _warned.add(old)
            print(
                f"hpc-absa: warning: {origin}: {old} is now called {new}; "
                "the old name will not be read by the next release",
                file=sys.stderr,
            )


def _rank(variable: str) -> bool:
    """Whether this process has a rank other than 0 by this variable."""
    return os.environ.get(variable, "0") != "0"
