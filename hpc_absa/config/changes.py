"""Whether a run may go on with another job file than it began with."""

from __future__ import annotations

from typing import Any

from hpc_absa.config.tables import Job
from hpc_absa.errors import UsageError

WITHOUT_EFFECT = (
    "name",
    "data.root",
    "ranks",
    "checkpoint",
    "launch",
    "train.device",
    "train.threads_per_rank",
)
"""Parts of a job that do not change its result, beyond the order of summation."""


def refuse_changes(saved: Job, now: Job, origin: str, allowed: tuple[str, ...]) -> None:
    """Refuse to go on with a job that could end otherwise than the one begun.

    Args:
        saved: the job that was begun.
        now: the job that is asked for.
        origin: where `saved` was found, for the error.
        allowed: keys that the user insists on changing.

    Raises:
        UsageError: names every key that differs.
    """
    old, new = _flat(saved.model_dump()), _flat(now.model_dump())
    changed = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and key not in allowed
        and not any(key == part or key.startswith(f"{part}.") for part in WITHOUT_EFFECT)
    ]
    if changed:
        differences = "; ".join(f"{k} = {old.get(k)!r} there, {new.get(k)!r} here" for k in changed)
        raise UsageError(
            f"{origin}: of a job that differs: {differences}; use another --run-dir, "
            f"--fresh to begin anew, or insist with --allow-changed {changed[0]}"
        )


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
