"""Base classes and number types of the tables of job and sweep files, and their errors."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Strings = Annotated[tuple[str, ...], Field(strict=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A frozen table; unknown keys are errors."""

    # Strict: `true` is not a number and "3" is not an integer, although Python could convert them.
    # Deferred: the validator of a whole job is compiled once, at its first use.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)


class OpenSection(Section):
    """A table that passes its other keys on as arguments of what it names."""

    model_config = ConfigDict(extra="allow")

    @property
    def arguments(self) -> dict[str, Any]:
        """The keys beyond this table's own fields."""
        return dict(self.model_extra or {})


def explain(
    error: ValidationError,
    model: type[BaseModel],
    tagged: Mapping[str, type[BaseModel]] = MappingProxyType({}),
) -> str:
    """The first of pydantic's errors as `key = value: expected ...`, with the number of others.

    Args:
        error: of `model`.
        model: what was validated.
        tagged: the tables in it that are chosen by their `method`.
    """
    errors = error.errors(include_url=False)
    first = errors[0]
    # The location of a union has the tag or type that was tried.
    tried = {*tagged, "int", "float", "str"}
    place = [str(part) for part in first["loc"] if part not in tried]
    if place[:2] == ["launch", "slurm"]:
        place = place[:3]
    key = ".".join(place) or "job"
    methods = ", ".join(sorted(tagged))
    match first["type"]:
        case "missing":
            message = f"{key}: missing, expected a value"
        case "extra_forbidden":
            message = f"{key} = {first['input']!r}: unknown key, expected "
            message += _known_keys(first["loc"], model, tagged)
        case "value_error":
            message = f"{key}." if place else ""
            message += str(first["ctx"]["error"])
        case "union_tag_invalid":
            message = f"{key}.method = {first['ctx']['tag']!r}: expected one of {methods}"
        case "union_tag_not_found" if isinstance(first["input"], dict):
            message = f"{key}.method: missing, expected one of {methods}"
        case kind:
            expected = _IN_TOML.get(kind, first["msg"].removeprefix("Input should be "))
            message = f"{key} = {first['input']!r}: expected {expected}"
    return message + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")


def _known_keys(
    location: tuple[int | str, ...], model: Any, tagged: Mapping[str, type[BaseModel]]
) -> str:
    """The known key that is most similar to the unknown one at `location`, or else all of them."""
    import difflib

    for part in location[:-1]:
        if part in model.model_fields:
            annotation = model.model_fields[part].annotation
            inner = [annotation, *typing.get_args(annotation)]
            tables = [each for each in inner if isinstance(each, type)]
            model = next((each for each in tables if issubclass(each, BaseModel)), model)
        elif isinstance(part, str):
            model = tagged[part]
    known = [field.alias or name for name, field in model.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), known, n=1)
    return f"{close[0]!r}?" if close else "one of " + ", ".join(sorted(known))


_IN_TOML = {
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "union_tag_not_found": "a table",
    "bool_type": "true or false",
}
"""The names of types in TOML, by pydantic's type of error."""
