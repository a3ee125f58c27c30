"""What a run's ranks wrote down (`watched.py`), as the steps that count.

A launch resumes from a checkpoint; whatever earlier launches did after that step is undone. What is
left are the committed steps, each with the samples that all of its ranks drew.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Visit = tuple[int, int]
"""Epoch and sample."""


@dataclass(frozen=True)
class Launch:
    """What the ranks of one mpirun did, in order of time."""

    name: str
    lines: tuple[dict[str, Any], ...]

    @property
    def begun(self) -> float:
        """Unix time of its first line."""
        return float(self.lines[0]["time"])

    @property
    def ended(self) -> float:
        """Unix time of its last line."""
        return float(self.lines[-1]["time"])

    def steps(self) -> dict[int, Counter[Visit]]:
        """What was drawn for each step, over all ranks."""
        drawn: dict[int, Counter[Visit]] = defaultdict(Counter)
        for line in self.lines:
            if line["kind"] == "step":
                drawn[line["step"]].update(map(tuple, line["visits"]))
        return dict(drawn)


def launches(folder: Path) -> list[Launch]:
    """All launches, oldest first."""
    lines: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in folder.glob("launch-*-rank-*.jsonl"):
        name = path.name.rpartition("-rank-")[0]
        lines[name] += [json.loads(line) for line in path.read_text().splitlines()]
    launches = [
        Launch(name, tuple(sorted(each, key=lambda line: line["time"])))
        for name, each in lines.items()
        if each
    ]
    return sorted(launches, key=lambda launch: launch.begun)


def committed(of: list[Launch]) -> dict[int, Counter[Visit]]:
    """The samples of each step that counts, by step."""
    kept: dict[int, Counter[Visit]] = {}
    for launch in of:
        steps = launch.steps()
        if steps:
            kept = {step: drawn for step, drawn in kept.items() if step < min(steps)}
            kept |= steps
    return kept


def overlapping(of: list[Launch]) -> list[tuple[str, str]]:
    """Worlds of which one did something before the one before it had ended: there must be none."""
    return [
        (one.name, other.name) for one, other in itertools.pairwise(of) if other.begun < one.ended
    ]


def next_step(of: list[Launch], moment: float) -> float | None:
    """Unix time of the first step of a launch begun after `moment`; None if there was none."""
    later = [
        line["time"]
        for launch in of
        if launch.begun > moment
        for line in launch.lines
        if line["kind"] == "step"
    ]
    return min(later, default=None)


def moment_at(of: list[Launch], when: float, ranks: list[int]) -> str:
    """What ranks with these process ids were last seen to begin before `when`."""
    if not ranks:
        return "between launches"
    for launch in of:
        if any(line.get("pid") in ranks for line in launch.lines):
            seen = [line for line in launch.lines if line["time"] <= when]
            return str(seen[-1].get("moment", "start")) if seen else "start"
    return "start"
