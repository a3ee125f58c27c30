"""The kill campaign: SIGKILL at random moments, over runs that grow from one rank to four.

`HPC_ABSA_SOAK_KILLS` (200) kills, up to ten a run, drawn from `HPC_ABSA_SOAK_SEED` (0). Some of the
moments are uniform over the duration of a launch; the others are close to what matters most: the
start, a save, the Hessian, an evaluation, the time between two launches.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import psutil
import pytest

from tests.soak import ledger
from tests.soak.runs import SoakRun, weights, write_job
from tests.soak.summary import Case, Summary

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

KILLS = int(os.environ.get("HPC_ABSA_SOAK_KILLS", "200"))
SEED = int(os.environ.get("HPC_ABSA_SOAK_SEED", "0"))
PER_RUN = 10
TOGETHER = 2
"""Runs that are under attack at the same time: a run waits more than it computes."""
SHAPE = {"epochs": 20, "kappa": 4, "initial": 1, "most": 4}
"""Growth after epochs 4 and 8; then twelve epochs on four ranks."""
FOUR = 3
"""Every third run has four ranks in the end, the others two, which start in half the time: the bits
are the same."""
VICTIMS = ("rank", "rank", "mpirun", "supervisor", "tree")
MOMENTS = ("any", "any", "any", "start", "saving", "hessian", "evaluation", "relaunching")
GROWING = ("hessian", "relaunching")
"""Those that a run has behind it once it has grown."""
DURATION = 7.0
"""Seconds over which `any` is uniform: the start of a launch and its work."""


@dataclass(frozen=True)
class Kill:
    """What was killed, when (Unix time), and the process ids of the ranks at that time."""

    victim: str
    time: float
    ranks: list[int]


class Undisturbed:
    """The same job left alone, beside the first attacks: its ledger and its weights."""

    def __init__(self, folder: Path) -> None:
        self._run = SoakRun(folder, write_job(folder, **SHAPE)).start()

    @cached_property
    def result(self) -> tuple[dict[int, Counter[ledger.Visit]], str]:
        """The samples of each step, and the SHA-256 of the final weights."""
        assert self._run.finish() == 0, self._run.output_tail()
        assert [e["ranks"] for e in self._run.events("phase_start")] == [1, 2, 4]
        return ledger.committed(ledger.launches(self._run.watched)), weights(self._run.run)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("batch", range(-(-KILLS // (PER_RUN * TOGETHER))))
def test_killed_at_random_runs_end_as_if_undisturbed(
    tmp_path: Path, undisturbed: Undisturbed, batch: int, campaign: Summary
):
    with ThreadPoolExecutor(TOGETHER) as threads:
        numbers = range(batch * TOGETHER, (batch + 1) * TOGETHER)
        attacked = [
            each for some in threads.map(partial(_attack, tmp_path), numbers) for each in some
        ]
    committed, wanted = undisturbed.result
    for run, kills in attacked:
        launches = ledger.launches(run.watched)
        for kill in kills:
            resumed = ledger.next_step(launches, kill.time)
            seconds = None if resumed is None else resumed - kill.time
            moment = ledger.moment_at(launches, kill.time, kill.ranks)
            campaign.add(Case("kill", f"{kill.victim}, {moment}", seconds))
        assert ledger.overlapping(launches) == []
        assert ledger.committed(launches) == committed
        assert weights(run.run) == wanted


def test_undisturbed_every_sample_is_visited_once_an_epoch(undisturbed: Undisturbed):
    committed, _ = undisturbed.result
    assert sorted(committed) == list(range(1, len(committed) + 1))
    visits: Counter[ledger.Visit] = Counter()
    for drawn in committed.values():
        visits += drawn
    assert max(visits.values()) == 1
    whole = SHAPE["epochs"] * 1437
    assert whole - 128 < len(visits) <= whole


def _attack(folder: Path, number: int) -> list[tuple[SoakRun, list[Kill]]]:
    """Runs with one share of the kills, each to its end; one, or more where it was too quick."""
    draw = random.Random(f"{SEED}-{number}")
    left = max(0, min(PER_RUN, KILLS - number * PER_RUN))
    attacked = []
    while left:
        place = folder / f"{number}-{len(attacked)}"
        shape = {**SHAPE, "most": 2 if number % FOUR else 4}
        run, kills = SoakRun(place, write_job(place, **shape)).start(), []
        while len(kills) < left and _alive(run):
            if kill := _kill(run, draw):
                kills.append(kill)
        assert _to_its_end(run) == 0, run.output_tail()
        attacked.append((run, kills))
        left -= len(kills)
    return attacked


def _kill(run: SoakRun, draw: random.Random) -> Kill | None:
    """Kill something at a moment of the draw's choice; None where the run ended before."""
    grown = any(start["global_batch"] == 128 for start in run.events("phase_start"))
    moments = [each for each in MOMENTS if not (grown and each in GROWING)]
    victim, moment, spread = draw.choice(VICTIMS), draw.choice(moments), draw.random()
    if not _come_to(run, moment, spread):
        return None
    ranks = [rank.pid for rank in run.ranks()]
    when = time.time()
    try:
        victim = _strike(run, victim, draw)
    except psutil.NoSuchProcess:
        return None  # it ended by itself just before
    return Kill(victim, when, ranks)


def _alive(run: SoakRun) -> bool:
    """Make sure that a supervisor is running, with the same command again; False when done."""
    while (code := run.ended()) is not None:
        if code == 0 and run.events("done"):
            return False
        assert code in (0, 1, 75, -signal.SIGKILL), run.output_tail()
        run.start()
        time.sleep(0.05)
        if code == 1:  # ended by itself: it must get somewhere now
            run.wait_for(lambda: run.ranks() or run.ended() is not None, "a launch")
    return True


def _come_to(run: SoakRun, moment: str, spread: float) -> bool:
    """Let the run come to `moment`, and a little on by chance; False where it ends before."""
    begun = time.time()
    match moment:
        case "any":
            until = begun + spread * DURATION
            while time.time() < until and run.ended() is None:
                time.sleep(0.01)
            return run.ended() is None
        case "start":
            seconds, condition = 3.0, run.mpirun
        case "relaunching":
            count = len(run.events("phase_end"))
            seconds, condition = 2.0, lambda: len(run.events("phase_end")) > count
        case "saving":
            seconds, condition = 0.02, lambda: any(run.run.checkpoints.glob(".*.tmp"))
        case _:
            seconds, condition = 0.1, lambda: _reached(run, moment, begun)
    while not condition():
        if run.ended() is not None:
            return False
        if time.time() - begun > 30:
            break  # growth is over, no more such moment comes
        time.sleep(0.001)
    time.sleep(spread * seconds)
    return run.ended() is None


def _reached(run: SoakRun, moment: str, since: float) -> bool:
    """Whether any rank has begun `moment` after `since`."""
    wanted = f'"moment": "{moment}"'
    for path in run.watched.glob("launch-*-rank-0.jsonl"):
        if path.stat().st_mtime < since:
            continue
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 2000))
            if wanted in file.read().decode(errors="replace"):
                return True
    return False


def _strike(run: SoakRun, victim: str, draw: random.Random) -> str:
    """Kill it; everything where there is no such process at this moment. Says which it was."""
    match victim:
        case "mpirun":
            targets = [launcher] if (launcher := run.mpirun()) else []
        case "rank":
            targets = run.ranks()
        case "supervisor":
            targets = [run.supervisor()]
        case _:
            targets = []
    if not targets:
        run.kill_tree()
        return "tree"
    draw.choice(targets).kill()
    if victim == "supervisor":
        assert run.process is not None
        run.process.wait(30)
    return victim


def _to_its_end(run: SoakRun) -> int:
    """The same command, until the run is done."""
    for _ in range(10):
        code = run.finish()
        if code == 0:
            return code
        assert code in (1, 75, -signal.SIGKILL), run.output_tail()
        run.start()
    return code
