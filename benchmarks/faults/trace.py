"""What ranks record while they train, faults at stated steps, and what became of each sample.

The scripts of this folder call `begin` before the first step after a start, `read` for each batch
and `step` after each step. Rank 1 kills or stops itself at the steps of `EVENTS` ("50 kill").
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults.plain import Lines

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
_seen: list[int] = []


@cache
def _index() -> dict[bytes, int]:
    """Samples by their tokens, which are different."""
    lines = Lines()
    found = {lines[k][0].numpy().tobytes(): k for k in range(len(lines))}
    assert len(found) == len(lines)
    return found


def _write(record: dict[str, Any]) -> None:
    with open(os.environ["TRACE"], "a") as file:
        file.write(json.dumps(record | {"time": time.time(), "pid": os.getpid()}) + "\n")


def begin() -> None:
    _seen.clear()
    _index()
    _write({})


def read(inputs: torch.Tensor) -> None:
    _seen.extend(_index()[row.numpy().tobytes()] for row in inputs)


def step(rank: int, number: int, epoch: int) -> None:
    """After step `number`, from 1."""
    time.sleep(float(os.environ["PACE"]))
    _write({"rank": rank, "step": number, "epoch": epoch, "samples": list(_seen)})
    _seen.clear()
    for at, what in (event.split() for event in filter(None, os.environ["EVENTS"].split(","))):
        if rank == 1 and int(at) == number and what in SIGNALS and _once(at):
            os.kill(os.getpid(), SIGNALS[what])


def _once(at: str) -> bool:
    try:
        Path(f"{os.environ['TRACE']}-{at}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@dataclass(frozen=True)
class Account:
    steps: int
    """Of which the final weights are made."""
    redone: int
    """Taken, and lost by a return to an earlier state."""
    lost: int
    """Samples of an epoch that the final weights have not seen."""
    repeated: int
    """Samples that they have seen more than once in an epoch."""
    gap: float
    """Longest time between two steps, in seconds."""


def account(records: Iterable[dict[str, Any]], epochs: int) -> Account:
    kept: dict[int, list[dict[str, Any]]] = {}
    redone, begun, times = 0, False, []
    for record in sorted(records, key=lambda one: one["time"]):
        if "step" not in record:
            begun = True
            continue
        if begun:  # the first step after a start: what came later in an earlier attempt is gone
            later = [number for number in kept if number >= record["step"]]
            redone, begun = redone + len(later), False
            for number in later:
                del kept[number]
        kept.setdefault(record["step"], []).append(record)
        times.append(record["time"])
    seen = Counter(
        (record["epoch"], sample)
        for ranks in kept.values()
        for record in ranks
        for sample in record["samples"]
    )
    gaps = [after - before for before, after in itertools.pairwise(times)]
    return Account(
        steps=len(kept),
        redone=redone,
        lost=epochs * len(_index()) - len(seen),
        repeated=sum(seen.values()) - len(seen),
        gap=max(gaps, default=float("nan")),
    )


def records(path: Path) -> list[dict[str, Any]]:
    """Of a trace to which ranks may still write."""
    if not path.exists():
        return []
    return [
        json.loads(line) for line in path.read_text().splitlines(keepends=True) if line[-1] == "\n"
    ]
