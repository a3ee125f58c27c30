"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One check's result."""

    check: str
    """Its name, fixed: scripts may look for it."""
    state: Literal["good", "fault", "not there"]
    """`not there`: nothing to check, and nothing that the job needs."""
    found: str
    """What there is, in a sentence."""
    cure: str | None = None
    """How to mend a fault."""


def good(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, "good", found)


def absent(check: str, found: str) -> Finding:
    """Nothing is there, and nothing is missed."""
    return Finding(check, "not there", found)


def fault(check: str, found: str, cure: str) -> Finding:
    """Something to mend."""
    return Finding(check, "fault", found, cure)
