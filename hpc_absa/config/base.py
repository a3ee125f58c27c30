"""What the tables of a job file are made of."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Section(BaseModel):
    """A table of the job file."""

    # Strict: `true` is no number and "3" no integer, whatever Python could make of them.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Named(BaseModel):
    """A table that names a thing and passes its other keys on as that thing's own arguments."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    name: str
    """A built-in one's name, or `package.module:function`."""

    @property
    def arguments(self) -> dict[str, Any]:
        """The keys beyond this table's own fields."""
        return dict(self.model_extra or {})
