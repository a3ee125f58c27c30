"""Disks that fail during a run: full, read-only, over a quota, with I/O errors.

Training continues or ends as `checkpoint.on_error` is set; earlier checkpoints stay good; the
message names path and cause; once the disk is repaired the run ends like the undisturbed one.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hpc_absa.checkpoint import manager
from tests.checkpoint.contents import mounted
from tests.soak import watched
from tests.soak.runs import SoakRun, weights, write_job
from tests.soak.summary import Case, Summary

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

SHAPE = {"epochs": 4, "kappa": 1, "initial": 1, "most": 1}
HELD = {watched.HOLD: "evaluation:0:1"}
"""After the first epoch, when checkpoints exist, the run waits until the fault is there."""


@pytest.fixture(scope="module")
def wanted(tmp_path_factory) -> str:
    """The final weights where no disk fails."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = SoakRun(folder, write_job(folder, **SHAPE)).start()
    assert run.finish() == 0, run.output_tail()
    return weights(run.run)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> Path:
    """The compiled library that makes system calls fail."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("injecting I/O errors needs a C compiler")
    library = tmp_path_factory.mktemp("faulty") / "faulty_disk.so"
    source = Path(__file__).with_name("faulty_disk.c")
    command = [compiler, "-O1", "-Wall", "-shared", "-fPIC", "-o", library, source, "-ldl"]
    subprocess.run(list(map(str, command)), check=True)
    return library


Fault = Callable[[SoakRun], "contextlib.AbstractContextManager[None]"]


def _held(run: SoakRun) -> list[Path]:
    """Start a run and wait until it is held; returns its good checkpoints."""
    run.start().wait_for(lambda: (run.watched / "held").exists(), "the moment")
    run.wait_for(lambda: run.events("checkpoint"), "a checkpoint")
    return [each.path for each in manager.verify(run.run.path) if not each.error]


def continues(run: SoakRun, fault: Fault, cause: str, wanted: str) -> None:
    """`on_error = "continue"`: a warning, and the run completes once the fault is over."""
    before = _held(run)
    with fault(run):
        (run.watched / "released").touch()
        run.wait_for(lambda: "training continues" in run.output_tail(), "a save that failed")
        _named(run, cause)
        assert manager.verify(before[-1])[0].error is None
    assert run.finish() == 0, run.output_tail()
    assert weights(run.run) == wanted


def stops(run: SoakRun, fault: Fault, cause: str, wanted: str) -> None:
    """`on_error = "stop"`: the run ends with the error, and the same command continues it."""
    before = _held(run)
    with fault(run):
        (run.watched / "released").touch()
        assert run.finish() == 1, run.output_tail()
        _named(run, cause)
        assert "Traceback" not in run.output_tail()
        assert manager.verify(before[-1])[0].error is None
    assert run.start().finish() == 0, run.output_tail()
    assert weights(run.run) == wanted


def _named(run: SoakRun, cause: str) -> None:
    """One line names a checkpoint's path and the cause."""
    lines = run.output_tail().splitlines()
    assert any(str(run.run.checkpoints) in each and cause in each for each in lines), (
        run.output_tail()
    )


OUTCOMES = {"continue": continues, "stop": stops}


def _run(folder: Path, on_error: str, **environment: str) -> SoakRun:
    options = ("--set", f"checkpoint.on_error={on_error}", "--set", "launch.max_restarts=2")
    return SoakRun(folder, write_job(folder, **SHAPE), *options, **HELD, **environment)


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


@pytest.mark.parametrize("on_error", OUTCOMES)
def test_a_full_disk(tmp_path: Path, wanted: str, campaign: Summary, on_error: str):
    run = _run(tmp_path, on_error)
    run.run.path.mkdir()
    with mounted(run.run.checkpoints, "size=1m") as folder:
        OUTCOMES[on_error](run, lambda _: filled(folder), "no space left on the device", wanted)
    campaign.add(Case("disk", f"full, {on_error}"))


def test_a_full_disk_of_the_run_directory(tmp_path: Path, wanted: str, campaign: Summary):
    """Events and logs cannot be written either: the run ends with the cause, and continues."""
    run = _run(tmp_path, "continue")
    with mounted(run.run.path, "size=4m") as folder:
        before = _held(run)
        with filled(folder):
            (run.watched / "released").touch()
            assert run.finish() == 1, run.output_tail()
            assert manager.verify(before[-1])[0].error is None
        tail = run.output_tail()
        # the events, or the log of a launch
        assert re.search(f"{re.escape(str(run.run.path))}/.*: cannot be written: No space", tail)
        assert "Traceback" not in tail
        assert run.start().finish() == 0, run.output_tail()
        assert weights(run.run) == wanted
    campaign.add(Case("disk", "full, of the run directory"))


# Read-only


@pytest.mark.parametrize("on_error", OUTCOMES)
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
        OUTCOMES[on_error](run, read_only, "Read-only file system", wanted)
    campaign.add(Case("disk", f"read-only, {on_error}"))


def _remount(folder: Path, how: str) -> None:
    """Tried again while a save has a file open there."""
    for _ in range(500):
        if not subprocess.run(["mount", "-o", f"remount,{how}", folder], stderr=-3).returncode:
            return
    pytest.fail(f"{folder}: cannot be remounted {how}")


# A quota


@pytest.mark.parametrize("on_error", OUTCOMES)
def test_a_limit_of_the_file_size(tmp_path: Path, wanted: str, campaign: Summary, on_error: str):
    """The limit is larger than the ledger and smaller than a checkpoint."""

    @contextlib.contextmanager
    def limited(run: SoakRun) -> Iterator[None]:
        import resource

        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        (rank,) = run.ranks()
        rank.rlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        yield
        with contextlib.suppress(Exception):
            for rank in run.ranks():
                rank.rlimit(resource.RLIMIT_FSIZE, unlimited)

    run = _run(tmp_path, on_error)
    OUTCOMES[on_error](run, limited, "File too large", wanted)
    campaign.add(Case("disk", f"file size, {on_error}"))


# I/O errors


@pytest.mark.parametrize("on_error", OUTCOMES)
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
    OUTCOMES[on_error](run, failing, "Input/output error", wanted)
    campaign.add(Case("disk", f"EIO in {call}, {on_error}"))
