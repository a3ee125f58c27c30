"""Base classes and number types of the tables of job and sweep files."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

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
