"""The signal campaign: four signals, to a rank, mpirun or the supervisor, in each moment of work.

Three of the four for each moment and target, 72 cases, so that each signal meets each moment.

A rank is held in the moment (`watched.py`) while the signal is sent. The run must end with status
75 and everything saved: the same command continues with the next step, and ends with the bits of
the undisturbed run.
"""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

import pytest

from hpc_absa.checkpoint import manager
from hpc_absa.errors import ExitStatus
from hpc_absa.supervisor.launchers import KILL_SECONDS
from tests.soak import ledger, watched
from tests.soak.runs import SoakRun, weights, write_job
from tests.soak.summary import Case, Summary
from tests.supervised import processes

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
TARGETS = ("rank", "mpirun", "supervisor")
GROWING, RELAUNCHING = "evaluation before a growth", "relaunching"
HELD = {
    "start": "start:1:1",
    "first step": "step:1:1",
    "adversarial examples": "adversarial:1:1",
    "Hessian": "hessian:0:1",
    "evaluation": "evaluation:1:1",
    "saving": "saving:0:1",
    GROWING: "evaluation:0:1",
}
"""Moments, which rank stands still in it, and for which time it comes to it then."""
TOGETHER = 3
"""Runs at the same time: they mostly wait."""
AT_ONCE = 15.0
"""Seconds that a second Ctrl-C may take; the launcher waits 5 of them for its ranks."""


def shape(moment: str) -> dict[str, int]:
    """Two ranks throughout, or a growth from one to two where that is what is disturbed."""
    if moment in (GROWING, RELAUNCHING):
        return {"epochs": 3, "kappa": 1, "initial": 1, "most": 2, "base": 32, "largest": 64}
    return {"epochs": 3, "kappa": 1, "initial": 2, "most": 2, "base": 64, "largest": 128}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The committed steps and the final weights of the same job left alone, by moment."""

    @cache
    def of(most: int) -> tuple[object, str]:
        folder = tmp_path_factory.mktemp("undisturbed")
        moment = RELAUNCHING if most == 64 else "start"
        run = SoakRun(folder, write_job(folder, **shape(moment))).start()
        assert run.finish() == 0, run.output_tail()
        return ledger.committed(ledger.launches(run.watched)), weights(run.run)

    return lambda moment: of(shape(moment)["largest"])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("moment", [*HELD, RELAUNCHING])
def test_a_signal_saves_and_the_same_command_continues(
    tmp_path: Path, undisturbed, campaign: Summary, moment: str, target: str
):
    wanted = undisturbed(moment)
    left_out = SIGNALS[([*HELD, RELAUNCHING].index(moment) + TARGETS.index(target)) % 4]
    signals = [number for number in SIGNALS if number != left_out]
    with ThreadPoolExecutor(TOGETHER) as threads:
        outcomes = list(threads.map(partial(_case, tmp_path, wanted, moment, target), signals))
    for number, outcome in zip(signals, outcomes, strict=True):
        kind = f"{number.name} to {target}, {moment}"
        campaign.add(Case("signal", kind, outcome=outcome or "passed"))
    assert not any(outcomes), dict(zip([s.name for s in signals], outcomes, strict=True))


def _case(
    folder: Path, wanted: tuple[object, str], moment: str, target: str, number: signal.Signals
) -> str | None:
    """What went wrong; None where all went well."""
    place = folder / number.name
    hold = {watched.HOLD: HELD[moment]} if moment in HELD else {}
    run = SoakRun(place, write_job(place, **shape(moment)), **hold).start()
    try:
        if moment == RELAUNCHING:
            _signal_between_launches(run, target, number)
        else:
            _signal_while_held(run, target, number)
        code = run.finish(60)
        if code != ExitStatus.STOPPED:
            return f"exit {code}, not 75: {run.output_tail()[-500:]}"
        if left := processes(run.run):
            return f"left running: {left}"
        before = ledger.launches(run.watched)
        code = run.start().finish(120)
        if code != 0:
            return f"exit {code} after the stop: {run.output_tail()[-500:]}"
    except AssertionError as error:
        return str(error)[-700:]
    return _differs(run, wanted, before)


def _differs(run: SoakRun, wanted: tuple[object, str], before: list[ledger.Launch]) -> str | None:
    """How the run is another than the undisturbed one; None where it is the same."""
    after = ledger.launches(run.watched)
    committed, bits = wanted
    if ledger.overlapping(after):
        return "two launches at the same time"
    if ledger.committed(after) != committed:
        return "other samples"
    if weights(run.run) != bits:
        return "other weights"
    last = max((max(launch.steps(), default=0) for launch in before), default=0)
    names = {launch.name for launch in before}
    first = min(step for w in after if w.name not in names for step in w.steps() or [10**9])
    if first <= last:
        return f"steps {first} to {last} were lost"
    return None


def _signal_while_held(run: SoakRun, target: str, number: signal.Signals) -> None:
    held = run.watched / "held"
    run.wait_for(lambda: held.exists() and held.read_text(), "the moment")
    match target:
        case "rank":
            os.kill(int(held.read_text()), number)
        case "mpirun":
            launcher = run.mpirun()
            assert launcher is not None
            launcher.send_signal(number)
            if number in (signal.SIGTERM, signal.SIGINT):
                time.sleep(KILL_SECONDS + 0.5)  # mpirun waits before it signals its ranks
        case _:
            run.supervisor().send_signal(number)
            run.wait_for(lambda: run.run.stop_request.exists(), "a request to stop")
    (run.watched / "released").touch()


def _signal_between_launches(run: SoakRun, target: str, number: signal.Signals) -> None:
    """As soon as the next launch's target exists; its ranks have not loaded a module yet."""
    run.wait_for(lambda: run.events("phase_start"), "the first launch")
    first = run.mpirun()
    assert first is not None
    run.wait_for(lambda: run.events("phase_end"), "the end of the first launch")
    if target == "supervisor":
        run.supervisor().send_signal(number)
        return

    def next_launcher() -> object:
        launcher = run.mpirun()
        return launcher is not None and launcher.pid != first.pid

    run.wait_for(next_launcher, "the next launch's mpirun")
    if target == "rank":
        run.wait_for(run.ranks, "the next launch's ranks")
        run.ranks()[-1].send_signal(number)
    else:
        launcher = run.mpirun()
        assert launcher is not None
        launcher.send_signal(number)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("moment", ["first step", "saving", "Hessian"])
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, undisturbed, moment: str, campaign: Summary):
    run = SoakRun(tmp_path, write_job(tmp_path, **shape(moment)), HPC_ABSA_HOLD=HELD[moment])
    run.start()
    run.wait_for(lambda: (run.watched / "held").exists(), "the moment")
    run.supervisor().send_signal(signal.SIGINT)
    run.wait_for(lambda: run.run.stop_request.exists(), "a request to stop")
    begun = time.monotonic()
    run.supervisor().send_signal(signal.SIGINT)
    assert run.finish(60) == ExitStatus.STOPPED, run.output_tail()
    assert time.monotonic() - begun < AT_ONCE
    checked = manager.verify(run.run.path) if any(run.run.checkpoints.glob("*.h5")) else []
    assert [each.error for each in checked if each.error] == []
    (run.watched / "released").touch()
    assert run.start().finish(120) == 0, run.output_tail()
    assert ledger.committed(ledger.launches(run.watched)) == undisturbed(moment)[0]
    assert weights(run.run) == undisturbed(moment)[1]
    campaign.add(Case("signal", f"second SIGINT to supervisor, {moment}"))
