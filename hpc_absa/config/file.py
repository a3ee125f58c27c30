"""Reading, writing and comparing job files; errors name file, key, value and what was expected."""

from __future__ import annotations

import copy
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hpc_absa.allocation import launcher_rank
from hpc_absa.config.tables import Job
from hpc_absa.errors import UsageError
from hpc_absa.schedules import SCHEDULES
from hpc_absa.section import explain

Table = TypeVar("Table", bound=BaseModel)

WITHOUT_EFFECT = (
    "name",
    "data.root",
    "data.workers",
    "ranks",
    "checkpoint",
    "launch",
    "train.device",
    "train.on_nonfinite_loss",
    "train.threads_per_rank",
)
"""Parts of a job that do not change its result, beyond the order of summation."""

FIXED = ("train.microbatch",)
"""What a run keeps to its end: its position in the data is counted in microbatches."""

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
"""New keys by old ones; an old key works for one release, with a warning."""

RENAMED_VALUES: dict[str, dict[Any, Any]] = {"train.remainder": {"carry": False, "drop": True}}
"""New values by old ones, for the old keys whose values changed too."""

EARLIER_DEFAULTS = {
    method: {"reference_after_patience": "reset"} for method in ("abs", "absa", "absa-tuned")
}
"""By method: how a stored job without these keys of `[schedule]` was run, before they existed;
others have every key."""

_warned: set[str] = set()


def load(path: Path, overrides: tuple[str, ...] = (), *, warn: bool = True) -> Job:
    """The job in `path` with `key=value` overrides applied.

    Args:
        path: the job file.
        overrides: as after `--set`.
        warn: warn on standard error of old keys; False for files that we have written ourselves,
            which then get `EARLIER_DEFAULTS`.

    Raises:
        UsageError: one line that names file, key, value and what was expected.
    """
    tables = read(path)
    if "grid" in tables:
        raise UsageError(f"{path}: a sweep file, expected a job file: hpc-absa compare {path}")
    return from_tables(tables, str(path), overrides, warn=warn)


def read(path: Path, kind: str = "a job file") -> dict[str, Any]:
    """The tables of a TOML file, not validated."""
    try:
        return _tables(path.read_text(encoding="utf-8-sig"), str(path))  # editors add a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as {kind}: {error}") from None


def parse(text: str, origin: str, overrides: tuple[str, ...] = (), *, warn: bool = True) -> Job:
    """As `load`, from a job file's text; `origin` names it in errors."""
    return from_tables(_tables(text, origin), origin, overrides, warn=warn)


def _tables(text: str, origin: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{origin}: not valid TOML: {error}") from None


def from_tables(
    tables: Mapping[str, Any], origin: str, overrides: tuple[str, ...] = (), *, warn: bool = True
) -> Job:
    """As `parse`, from the tables of a job file, which are not modified."""
    return validate(Job, tables, origin, overrides, warn=warn)


def validate(
    model: type[Table],
    tables: Mapping[str, Any],
    origin: str,
    overrides: tuple[str, ...] = (),
    *,
    warn: bool = True,
) -> Table:
    """A table of type `model` from `tables`, which are not modified; errors as of `load`."""
    changed = copy.deepcopy(dict(tables))
    for override in overrides:
        _override(changed, override)
    _rename_keys(changed, origin, warn=warn)
    if not warn:
        _add_earlier_defaults(changed)
    try:
        return model.model_validate(changed)
    except ValidationError as error:
        raise UsageError(f"{origin}: {explain(error, model, SCHEDULES)}") from None


def dump(job: BaseModel) -> str:
    """The job as TOML with all defaults; `parse` gives the same job back."""
    import tomli_w

    return tomli_w.dumps(job.model_dump(exclude_none=True, by_alias=True))


def refuse_changes(saved: Job, now: Job, origin: str, allowed: tuple[str, ...]) -> None:
    """Refuse to continue a run with a job that could give another result.

    Args:
        saved: the job of the run.
        now: the job to continue it with.
        origin: where `saved` was read, for the error.
        allowed: keys that may differ, as after `--allow-changed`.

    Raises:
        UsageError: names every key that differs.
    """
    old, new = _flat(saved.model_dump()), _flat(now.model_dump())
    changed = [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and repr(old.get(key)) != repr(new.get(key))  # NaN is not equal to itself
        and (key not in allowed or key in FIXED)
        and not any(key == part or key.startswith(f"{part}.") for part in WITHOUT_EFFECT)
    ]
    if changed:
        differences = "; ".join(f"{k} = {old.get(k)!r} there, {new.get(k)!r} here" for k in changed)
        key, remedy = changed[0], "use another --run-dir, or --fresh to start over"
        if key not in FIXED:
            by_script = f", in absa.Run allow_changed=[{key!r}]" * (now.data.name == "script")
            remedy = f"use another --run-dir, --fresh to start over, or --allow-changed {key}"
            remedy += by_script
        raise UsageError(f"{origin}: another job: {differences}; {remedy}")


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _override(tables: dict[str, Any], override: str) -> None:
    """Apply `section.key=value`; the value is TOML, or else a string as it is."""
    key, equals, value = override.partition("=")
    *path, name = key.strip().split(".")
    if not equals or not all([*path, name]):
        raise UsageError(f"--set {override}: expected key=value, for example train.epochs=3")
    table: Any = tables
    for part in path:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override}: {part} is a value, expected a table")
    try:
        table[name] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[name] = value.strip()


def _rename_keys(tables: dict[str, Any], origin: str, *, warn: bool) -> None:
    """Replace old keys by new ones in place; warn of each once, on rank 0."""
    for old, new in RENAMED.items():
        *path, name = old.split(".")
        table: Any = tables
        for part in path:
            table = table.get(part) if isinstance(table, dict) else None
        if not isinstance(table, dict) or name not in table:
            continue
        new_name = new.rpartition(".")[2]
        if new_name in table:
            raise UsageError(f"{origin}: {old} is the old name of {new}: expected only {new}")
        value = table.pop(name)
        if (values := RENAMED_VALUES.get(old)) is not None:
            if value not in list(values):  # it may be a list, which has no hash
                known = ", ".join(
                    f"{v!r} (now {new} = {str(w).lower()})" for v, w in values.items()
                )
                raise UsageError(f"{origin}: {old} = {value!r}: expected {known}")
            value = values[value]
        table[new_name] = value
        if warn and launcher_rank() == 0 and old not in _warned:
            _warned.add(old)
            print(
                f"hpc-absa: warning: {origin}: {old} is now called {new}; "
                "the next release will not accept the old name",
                file=sys.stderr,
            )


def _add_earlier_defaults(tables: dict[str, Any]) -> None:
    schedule = tables.get("schedule")
    if isinstance(schedule, dict):
        earlier = EARLIER_DEFAULTS.get(str(schedule.get("method")), {})
        tables["schedule"] = {**earlier, **schedule}
