"""What the campaigns count, and the table at the end."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

RECORD = "HPC_ABSA_SOAK_RECORD"
"""A file that cases are appended to, so that a campaign run in parts has one table."""


@dataclass(frozen=True)
class Case:
    """One fault and what came of it."""

    campaign: str
    kind: str
    seconds: float | None = None
    """From the fault to the next step, where there was one."""
    outcome: str = "passed"


@dataclass
class Summary:
    """The cases of this session."""

    cases: list[Case] = field(default_factory=list)

    def add(self, case: Case) -> None:
        """Count a case; also in the record, where there is one."""
        self.cases.append(case)
        if path := os.environ.get(RECORD):
            with Path(path).open("a") as file:
                file.write(json.dumps(asdict(case)) + "\n")

    def table(self) -> list[str]:
        """Lines of a table, campaign by campaign."""
        lines = []
        for name in dict.fromkeys(case.campaign for case in self.cases):
            cases = [case for case in self.cases if case.campaign == name]
            lines.append(f"{name}: {len(cases)} cases{_times(cases)}")
            for kind in sorted({case.kind for case in cases}):
                of_kind = [case for case in cases if case.kind == kind]
                outcomes = sorted({case.outcome for case in of_kind})
                note = "" if outcomes == ["passed"] else f"  {', '.join(outcomes)}"
                lines.append(f"  {len(of_kind):6d}  {kind}{_times(of_kind)}{note}")
        return lines


def read(path: Path) -> Summary:
    """The cases of a record."""
    return Summary([Case(**json.loads(line)) for line in path.read_text().splitlines()])


def _times(cases: list[Case]) -> str:
    seconds = sorted(case.seconds for case in cases if case.seconds is not None)
    if not seconds:
        return ""
    high = seconds[min(len(seconds) - 1, round(0.95 * (len(seconds) - 1)))]
    return f"; to the next step: median {statistics.median(seconds):.1f} s, 95 % {high:.1f} s"


if __name__ == "__main__":
    print("\n".join(read(Path(os.environ[RECORD])).table()))
