"""Reading and writing job files; errors name file, key, value and what was expected."""

from __future__ import annotations

import copy
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from hpc_absa.config.renamed import rename_keys
from hpc_absa.config.schedule import SCHEDULES
from hpc_absa.config.tables import Job
from hpc_absa.errors import UsageError


def load(path: Path, overrides: tuple[str, ...] = (), *, warn: bool = True) -> Job:
    """The job in `path` with `key=value` overrides applied.

    Args:
        path: the job file.
        overrides: as after `--set`.
        warn: name old keys on standard error; False for files that we have written ourselves.

    Raises:
        UsageError: one line that names file, key, value and what was expected.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read as a job file: {error}") from None
    return parse(text, str(path), overrides, warn=warn)


def parse(text: str, origin: str, overrides: tuple[str, ...] = (), *, warn: bool = True) -> Job:
    """As `load`, from a job file's text; `origin` names it in errors."""
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{origin}: not valid TOML: {error}") from None
    return from_tables(tables, origin, overrides, warn=warn)


def from_tables(
    tables: Mapping[str, Any], origin: str, overrides: tuple[str, ...] = (), *, warn: bool = True
) -> Job:
    """As `parse`, from the tables of a job file, which stay as they are."""
    changed = copy.deepcopy(dict(tables))
    for override in overrides:
        _override(changed, override)
    rename_keys(changed, origin, warn=warn)
    try:
        return Job.model_validate(changed)
    except ValidationError as error:
        raise UsageError(f"{origin}: {explain(error, Job)}") from None


def dump(job: Job) -> str:
    """The job as TOML with every default spelled out; `parse` gives the same job back."""
    import tomli_w

    return tomli_w.dumps(job.model_dump(mode="json", exclude_none=True, by_alias=True))


def _override(tables: dict[str, Any], override: str) -> None:
    """Apply `section.key=value`; the value is TOML, and a bare word is a string."""
    key, equals, value = override.partition("=")
    words = key.strip().split(".")
    if not equals or not all(words):
        raise UsageError(f"--set {override}: expected key=value, for example train.epochs=3")
    table: Any = tables
    for word in words[:-1]:
        table = table.setdefault(word, {})
        if not isinstance(table, dict):
            raise UsageError(f"--set {override}: {word} is a value, expected a table")
    try:
        table[words[-1]] = tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        table[words[-1]] = value.strip()


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of pydantic's complaints as `key = value: expected ...`, with a count of others.

    `model` is what was validated.
    """
    complaints = error.errors(include_url=False)
    first = complaints[0]
    union_tags = set(SCHEDULES)
    place = [str(word) for word in first["loc"] if word not in union_tags]
    if place[:2] == ["launch", "slurm"]:
        place = place[:3]  # after the option comes the type that was tried
    key = ".".join(place) or "job"
    more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
    match first["type"]:
        case "missing":
            message = f"{key}: missing, expected a value"
        case "extra_forbidden":
            message = f"{key} = {first['input']!r}: unknown key, expected "
            message += _siblings(first["loc"], model)
        case "value_error":
            section = f"{key}." if place else ""
            message = f"{section}{first['ctx']['error']}"
        case "union_tag_invalid":
            tags = ", ".join(sorted(union_tags))
            message = f"{key}.method = {first['ctx']['tag']!r}: expected one of {tags}"
        case "union_tag_not_found" if not isinstance(first["input"], dict):
            message = f"{key} = {first['input']!r}: expected a table"
        case "union_tag_not_found":
            message = f"{key}.method: missing, expected one of {', '.join(sorted(union_tags))}"
        case _:
            wanted = first["msg"].removeprefix("Input should be ")
            wanted = _IN_TOML.get(first["type"], wanted)
            message = f"{key} = {first['input']!r}: expected {wanted}"
    return message + more


def _siblings(location: tuple[int | str, ...], model: Any) -> str:
    """The keys that are known where an unknown one stood, the most similar ones first."""
    import difflib

    for word in location[:-1]:
        if word in model.model_fields:
            annotation = model.model_fields[word].annotation
            inner = [annotation, *typing.get_args(annotation)]
            tables = [each for each in inner if isinstance(each, type)]
            model = next((each for each in tables if issubclass(each, BaseModel)), model)
        elif isinstance(word, str):
            model = SCHEDULES[word]
    known = [field.alias or name for name, field in model.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"{close[0]!r}?" if close else "one of " + ", ".join(sorted(known))


_IN_TOML = {
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "bool_type": "true or false",
}
"""What TOML calls things."""
