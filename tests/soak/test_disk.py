"""Disks that fail while a run is at work: full, read-only, over a quota, with I/O errors.

The training goes on or ends as `checkpoint.on_error` says; the checkpoints from before stay good;
what is said names path and cause; once the disk is mended the run ends as the undisturbed one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpc_absa.checkpoint import verification
from tests.checkpoint.contents import mounted
from tests.soak import watched
from tests.soak.runs import SoakRun, weights, write_job
from tests.soak.summary import Case, Summary

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

SHAPE = {"epochs": 4, "kappa": 1, "initial": 1, "most": 1}
HELD = {watched.HOLD: "evaluation:0:1"}
"""After the first epoch, when checkpoints exist, the run stands still until the fault is there."""


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> str:
    """The final weights where no disk fails."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = SoakRun(folder, write_job(folder, **SHAPE)).start()
    assert run.finish() == 0, run.told()
    return weights(run.run)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """The layer that makes system calls fail, compiled."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("injecting I/O errors needs a C compiler")
    library = tmp_path_factory.mktemp("faulty") / "faulty_disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    words = [compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(list(map(str, words)), check=True)
    return library


Fault = Callable[[SoakRun], "contextlib.AbstractContextManager[None]"]


def _held(run: SoakRun) -> list[Path]:
    """Start a run and let it come to the moment; returns its good checkpoints."""
    run.start().wait_for(lambda: (run.watched / "held").exists(), "the moment")
    run.wait_for(lambda: run.events("checkpoint"), "a checkpoint")
    return [each.path for each in verification.verify(run.run.path) if not each.error]


def goes_on(run: SoakRun, fault: Fault, cause: str, wanted: str) -> None:
    """`on_error = "continue"`: told, and nothing else; the run ends well once the fault is over."""
    before = _held(run)
    with fault(run):
        (run.watched / "released").touch()
        run.wait_for(lambda: "training goes on" in run.told(), "a save that failed")
        _named(run, cause)
        assert verification.verify(before[-1])[0].error is None
    assert run.finish() == 0, run.told()
    assert weights(run.run) == wanted


def stops(run: SoakRun, fault: Fault, cause: str, wanted: str) -> None:
    """`on_error = "stop"`: the run ends with the error, and the same command goes on later."""
    before = _held(run)
    with fault(run):
        (run.watched / "released").touch()
        assert run.finish() == 1, run.told()
        _named(run, cause)
        assert "Traceback" not in run.told()
        assert verification.verify(before[-1])[0].error is None
    assert run.start().finish() == 0, run.told()
    assert weights(run.run) == wanted


def _named(run: SoakRun, cause: str) -> None:
    """One line names a checkpoint's path and the cause."""
    lines = run.told().splitlines()
    assert any(str(run.run.checkpoints) in each and cause in each for each in lines), run.told()


WAYS = {"continue": goes_on, "stop": stops}


def _run(folder: Path, on_error: str, **environment: str) -> SoakRun:
    words = ("--set", f"checkpoint.on_error={on_error}", "--set", "launch.max_restarts=2")
    return SoakRun(folder, write_job(folder, **SHAPE), *words, **HELD, **environment)


# Full


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Not a byte is free in the file system of `folder`."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    try:
        yield
    finally:
        filler.unlink()


@pytest.mark.parametrize("on_error", WAYS)
def test_a_full_disk(tmp_path: Path, wanted: str, campaign: Summary, on_error: str):
    run = _run(tmp_path, on_error)
    run.run.path.mkdir()
    with mounted(run.run.checkpoints, "size=1m") as folder:
        WAYS[on_error](run, lambda _: filled(folder), "no space left on the device", wanted)
    campaign.add(Case("disk", f"full, {on_error}"))


def test_a_full_disk_under_the_whole_run(tmp_path: Path, wanted: str, campaign: Summary):
    """Events and logs have no room either: the run may end, but says why and goes on later."""
    run = _run(tmp_path, "continue")
    with mounted(run.run.path, "size=4m") as folder:
        before = _held(run)
        with filled(folder):
            (run.watched / "released").touch()
            assert run.finish() == 1, run.told()
            assert verification.verify(before[-1])[0].error is None
        told = run.told()
        assert f"{run.run.events}: cannot be written: No space left on device" in told
        assert "Traceback" not in told
        assert run.start().finish() == 0, run.told()
        assert weights(run.run) == wanted
    campaign.add(Case("disk", "full under the whole run"))


# Read-only


@pytest.mark.parametrize("on_error", WAYS)
def test_a_file_system_turned_read_only(
    tmp_path: Path, wanted: str, campaign: Summary, on_error: str
):
    @contextlib.contextmanager
    def read_only(run: SoakRun) -> Iterator[None]:
        _remount(run.run.checkpoints, "ro")
        try:
            yield
        finally:
            _remount(run.run.checkpoints, "rw")

    run = _run(tmp_path, on_error)
    run.run.path.mkdir()
    with mounted(run.run.checkpoints, "size=4m"):
        WAYS[on_error](run, read_only, "Read-only file system", wanted)
    campaign.add(Case("disk", f"read-only, {on_error}"))


def _remount(folder: Path, how: str) -> None:
    """Again while a save has a file open there."""
    for _ in range(500):
        if not subprocess.run(["mount", "-o", f"remount,{how}", folder], stderr=-3).returncode:
            return
    pytest.fail(f"{folder}: cannot be remounted {how}")


# A quota


@pytest.mark.parametrize("on_error", WAYS)
def test_a_limit_of_bytes(tmp_path: Path, wanted: str, campaign: Summary, on_error: str):
    """The largest file that a rank may write: more than the ledger has, less than a checkpoint."""

    @contextlib.contextmanager
    def limited(run: SoakRun) -> Iterator[None]:
        import resource

        none = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        (rank,) = run.ranks()
        rank.rlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        yield
        with contextlib.suppress(Exception):
            for rank in run.ranks():
                rank.rlimit(resource.RLIMIT_FSIZE, none)

    run = _run(tmp_path, on_error)
    WAYS[on_error](run, limited, "File too large", wanted)
    campaign.add(Case("disk", f"limit of bytes, {on_error}"))


# I/O errors


@pytest.mark.parametrize("on_error", WAYS)
@pytest.mark.parametrize("call", ["open", "write", "read", "fsync", "rename"])
def test_an_io_error(
    tmp_path: Path, wanted: str, faulty: Path, campaign: Summary, call: str, on_error: str
):
    switch = tmp_path / "switch"
    switch.mkdir()

    @contextlib.contextmanager
    def failing(_: SoakRun) -> Iterator[None]:
        (switch / call).touch()
        try:
            yield
        finally:
            (switch / call).unlink()

    run = _run(
        tmp_path,
        on_error,
        LD_PRELOAD=os.fspath(faulty),
        FAULTY_PATH="/run/checkpoints/",
        FAULTY_SWITCH=os.fspath(switch),
    )
    WAYS[on_error](run, failing, "Input/output error", wanted)
    campaign.add(Case("disk", f"EIO in {call}, {on_error}"))
